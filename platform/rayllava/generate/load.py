"""Folder -> Engine: how a finished model gets to answer."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch

from rayllava.checkpoint.manifest import SourceSpec, local_model, read_model_manifest
from rayllava.generate.engine import Engine
from rayllava.model.quant import check_quant, quantize
from rayllava.model.restore import restore
from rayllava.model.source import open_source
from rayllava.prompt.encode import Processor

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_engine(
    model: Path | str,
    *,
    quant: str = "none",
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    max_batch: int = 16,
    source: SourceSpec | None = None,
) -> Engine:
    """Return an engine for RUN/export, for RUN, or for a checkpoint of any layout.

    `model` is a path, or an address in a store; `source` says of it what its files do not. Without `dtype` the model
    computes in float32 on the CPU and in bfloat16 elsewhere. `threads` sets the torch threads of the whole process.
    """
    check_quant(quant)
    place = _device(device)
    number = dtype_of(dtype) if dtype else torch.float32 if place.type == "cpu" else torch.bfloat16
    path = local_model(str(model))
    if source is None:
        read_model_manifest(path)  # which says how it is asked, or how to get one that does
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="rayllava-") as scratch:
        found = open_source(path, source or SourceSpec(), scratch=Path(scratch), field="MODEL")
        if found.manifest.proved is False:
            log.warning("%s is converted and not proved to be the model it was made from", path)
        processor = Processor(found.manifest.processor, found.stored.tokenizer_dir)
        llava = restore(found.stored, dtype=number)
    quantize(llava, quant, device=place)  # type: ignore[arg-type]
    llava.to(place)
    log.info("loaded %s: quant=%s, %s on %s", path, quant, str(number).removeprefix("torch."), place)
    return Engine(llava, processor, max_batch=max_batch)


def dtype_of(name: str) -> torch.dtype:
    """Return torch's dtype; ValueError when we compute in no such one."""
    if name not in DTYPES:
        raise ValueError(f"dtype={name} is none of {', '.join(DTYPES)}")
    return DTYPES[name]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name} is unknown; use cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: torch sees no GPU here; use device=cpu")
    return device
