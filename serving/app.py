"""The HTTP face of a model: what `serve run serving.app:build model=DIR quant=nf4` starts.

    socket -> Ingress (CPU: token, limits, body, pictures) -> Engine (its own thread, batching) -> JSON or SSE

The endpoint's token comes from the environment, RAYLLAVA_API_TOKEN, as secrets do: command lines and configs are
read by many. It is read where the application is built, and only its digest travels on.
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field
from ray.serve import Application

from rayllava import durable
from rayllava.checkpoint.manifest import local_model, read_model_manifest
from rayllava.place import Place
from rayllava.spec import Spec, override
from serving.access import check_exposure
from serving.ingress import Ingress
from serving.replica import EngineReplica, Load


class ServeSpec(Spec):
    """One model behind one endpoint. The words of `serve run serving.app:build`."""

    model: str = ""
    """Folder of the model: RUN, RUN/export, or what jobs/convert.py wrote; on a disk or in a store."""
    name: str = ""
    """What clients call it; empty takes the folder's name."""
    quant: Literal["none", "nf4", "int8"] = "none"
    """Precision of the language model's weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU when the cluster, or this machine, has one."""
    threads: int = Field(1, ge=1)
    """CPUs of the engine."""
    max_batch: int = Field(16, ge=1)
    """Answers that grow at the same time."""
    max_queued: int = Field(64, ge=1)
    """Requests that wait for the engine at an ingress replica; further ones get status 429."""


def build(args: dict[str, Any]) -> Application:
    """Return the application for `name=value` words; ValueError names the one that is wrong."""
    spec = override(ServeSpec(), [f"{key}={value}" for key, value in args.items()])
    return application(spec, token=os.environ.get("RAYLLAVA_API_TOKEN", ""))


def application(spec: ServeSpec, *, token: str = "", load: Load | None = None) -> Application:
    """Return an application; with an empty `token` it answers anybody, and on loopback only.

    `load` replaces the engine that rayllava.generate builds from the model.
    """
    if not spec.model:
        raise ValueError("model is not set; add model=DIR, for example RUN/export")
    model = spec.model if Place(spec.model).remote else str(Path(spec.model).absolute())
    folder = local_model(model, field="model")
    manifest = read_model_manifest(folder, field="model")
    check_exposure(token)
    device = _device(spec.device)
    fingerprint = durable.digest_of([manifest.model_dump(mode="json"), spec.quant, device])
    named = PurePosixPath(str(Place(model)))
    card = {
        "id": spec.name or (named.parent if named.name == "export" else named).name,
        "object": "model",
        "created": int((folder / "manifest.json").stat().st_mtime),
        "owned_by": "rayllava",
    }
    # Twice the batch at the engine, so that its next request is at hand when an answer ends.
    num_at_engine = 2 * spec.max_batch
    engine = EngineReplica.options(  # type: ignore[attr-defined]
        max_ongoing_requests=num_at_engine,
        max_queued_requests=spec.max_queued,
        ray_actor_options={"num_cpus": spec.threads, "num_gpus": 1 if device == "cuda" else 0},
    ).bind(load or partial(_load, model, spec.quant, device, spec.threads, spec.max_batch))
    digest = hashlib.sha256(token.encode()).digest() if token else None
    # Bodies are held here: without a bound of its own, the ingress would be where memory runs out.
    at_ingress = num_at_engine + spec.max_queued + 16
    ingress = Ingress.options(max_ongoing_requests=at_ingress)  # type: ignore[attr-defined]
    return ingress.bind(engine, card=card, fingerprint=f"fp_{fingerprint[:12]}", token_digest=digest)


def _device(name: str) -> str:
    import ray

    if name != "auto":
        return name
    if ray.is_initialized():
        return "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _load(model: str, quant: str, device: str, threads: int, max_batch: int) -> Any:
    from rayllava.generate.load import load_engine

    return load_engine(model, quant=quant, device=device, threads=threads, max_batch=max_batch)
