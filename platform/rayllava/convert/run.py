"""SRC --read--> StoredModel --write--> DST --prove--> DST/proof.json"""

from __future__ import annotations

import logging
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from rayllava import durable
from rayllava.checkpoint.layouts import LAYOUTS, StoredModel, detect, writable
from rayllava.checkpoint.manifest import ModelManifest, local_model, read_model_manifest
from rayllava.convert import prove
from rayllava.families import FAMILIES
from rayllava.generate.load import dtype_of
from rayllava.prompt.chat import TEMPLATES
from rayllava.spec import Spec

log = logging.getLogger(__name__)


class ConvertSpec(Spec):
    """What a folder without manifest.json does not say of itself, and what shall be different."""

    template: str | None = None
    """Prompt template that the model was trained with, a name in rayllava.prompt.chat.TEMPLATES."""
    aspect: Literal["pad", "crop"] | None = None
    """What happens to pictures that are not square; empty: what the folder's own files say."""
    family: str | None = None
    """Of the language model; empty: the one that goes with the template."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the written tensors; empty: as they are."""


def convert(src: Path | str, dst: Path, *, to: str, spec: ConvertSpec | None = None) -> dict[str, Any]:
    """Write the model in `src` to `dst` in another layout and return the proof, which dst/proof.json holds too.

    The proof's `proved` says whether `dst` may be relied on.
    """
    begin = time.perf_counter()
    spec = spec or ConvertSpec()
    if to not in writable():
        raise ValueError(f"to={to} cannot be written yet; there is: {', '.join(writable())}")
    src = local_model(str(src), field="SRC")
    layout = detect(src, field="SRC")
    _check_free(dst, src)
    stored = LAYOUTS[layout].read(src)
    manifest = _manifest(src, layout, stored, spec)
    wanted = stored.cast(dtype_of(spec.dtype)) if spec.dtype else stored
    manifest = LAYOUTS[to].write(dst, wanted, manifest)
    proof = _prove(stored, wanted, dst, manifest)
    proof |= {"from": layout, "to": to, "seconds": round(time.perf_counter() - begin, 2)}
    durable.write_json(dst / "proof.json", proof)
    return proof


def _manifest(src: Path, layout: str, stored: StoredModel, spec: ConvertSpec) -> ModelManifest:
    """Return the manifest of the folder, or make one from its files and what the person says."""
    if (src / "manifest.json").is_file():
        manifest = read_model_manifest(src, field="SRC")
        changes = spec.model_dump(include={"template", "aspect"}, exclude_none=True)
        return manifest.but(processor=manifest.processor.but(**changes), family=spec.family or manifest.family)
    names = ", ".join(TEMPLATES)
    if spec.template is None:
        raise ValueError(f"SRC={src} does not say how its model is asked; add template=NAME, one of: {names}")
    if spec.template not in TEMPLATES:
        raise ValueError(f"template={spec.template} is none of: {names}")
    processor = LAYOUTS[layout].describe(src, stored, template=spec.template, aspect=spec.aspect)
    return ModelManifest(
        processor=processor,
        family=spec.family or _family(spec.template),
        source=src.name,
        versions={name: version(name) for name in ("torch", "transformers", "safetensors")},
    )


def _family(template: str) -> str:
    for key, family in FAMILIES.items():
        if family.template == template:
            return key
    raise ValueError(f"template={template} belongs to no family; add family=NAME, one of: {', '.join(FAMILIES)}")


def _prove(stored: StoredModel, wanted: StoredModel, dst: Path, manifest: ModelManifest) -> dict[str, Any]:
    written = LAYOUTS[manifest.layout].read(dst)
    proof = prove.compare_tensors(wanted, written)
    ours = prove.our_side(stored, manifest.processor)
    prompts = prove.compare_logits(ours, prove.plain_side(dst), prove.fixed_prompts())
    share = prove.BOUNDS[torch.float32 if wanted is stored else wanted.dtype]
    for row in prompts.values():
        row["bound"] = share * max(row["max_abs_logit"], 1.0)
        row["proved"] = row["max_abs_logit_diff"] <= row["bound"] and row["max_abs_pixel_diff"] <= 1e-6
    proof["prompts"] = prompts
    proof["max_abs_logit_diff"] = {name: row["max_abs_logit_diff"] for name, row in prompts.items()}
    proof["bounds"] = {name: row.pop("bound") for name, row in prompts.items()}
    proof["dtype"] = str(wanted.dtype).removeprefix("torch.")
    proof["proved"] = proof["bit_equal"] and all(row["proved"] for row in prompts.values())
    return proof


def _check_free(dst: Path, src: Path) -> None:
    """Raise ValueError when writing `dst` would destroy something that is no earlier conversion."""
    if dst.resolve() == src.resolve() or dst.resolve() in src.resolve().parents:
        raise ValueError(f"DST={dst} would overwrite SRC={src}; give another folder")
    if dst.is_dir() and any(dst.iterdir()) and not (dst / "proof.json").is_file():
        raise ValueError(f"DST={dst} is not empty and no earlier conversion; give another folder")
    durable.check_writable(dst.parent)
