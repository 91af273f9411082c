"""SRC --open_source--> StoredModel --fill--> DST --proof_of--> DST/proof.json

DST is written beside its place, proved there, and renamed: who sees it sees all of it, with its proof.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from rayllava import durable
from rayllava.checkpoint.layouts import LAYOUTS, Found, Layout, StoredModel, fill
from rayllava.checkpoint.manifest import SourceSpec, local_model, read_model_manifest, write_model_manifest
from rayllava.checkpoint.weights import dtype_name, trail_of
from rayllava.convert.card import card
from rayllava.convert.part import write_part
from rayllava.convert.proof import UNPROVED, proof_of
from rayllava.convert.target import check_room, free, making
from rayllava.convert.watch import watched
from rayllava.model.source import Source, open_source

_SHORT = {"f32": "float32", "fp32": "float32", "f16": "float16", "fp16": "float16", "bf16": "bfloat16"}


class ConvertSpec(SourceSpec):
    """What SRC does not say of itself, and what DST shall be."""

    dtype: str = ""
    """Of the written tensors; empty: as they are."""

    @field_validator("dtype")
    @classmethod
    def _spelled(cls, value: str) -> str:
        return _SHORT.get(value, value)

    part: Literal["", "llm", "vision", "projector"] = ""
    """Which part is to be written alone; empty: the whole model."""
    keep_adapters: bool = False
    """Whether adapters stay apart from the weights that they belong to."""
    proof: bool = True
    """Whether both sides are loaded and compared."""
    force: bool = False
    """Whether an earlier DST is replaced, whatever it is."""


def convert(src: Path | str, dst: Path, *, to: str, spec: ConvertSpec | None = None) -> dict[str, Any]:
    """Write the model in `src` to `dst` in another layout and return the proof, which proof.json there holds too.

    The proof's `proved` says whether what was written may be relied on, and `at` where it lies: in `dst`, or beside
    it under a name of its own when it failed its proof.
    """
    begin = time.perf_counter()
    spec = spec or ConvertSpec()
    layout = _layout(to, spec)
    src = _source(src)
    dst = free(dst, [src, spec.base, spec.vision_tower], force=spec.force)
    with tempfile.TemporaryDirectory(prefix="rayllava-") as scratch:
        if spec.part:
            if spec.keep_adapters:
                raise ValueError(f"part={spec.part} is written with its adapters merged; leave --keep-adapters out")
            with making(dst) as target:
                prove_it = write_part(
                    src, target.folder, part=spec.part, to=to, spec=spec, dtype=spec.dtype, scratch=Path(scratch)
                )
                proof = (prove_it() if spec.proof else dict(UNPROVED)) | {"to": to, "part": spec.part}
                proof["seconds"] = round(time.perf_counter() - begin, 2)
                target.end(proof, failed=spec.proof and not proof["proved"])
            return proof | {"at": str(target.at)}
        source = open_source(src, spec, scratch=Path(scratch), exact=bool(spec.dtype))
        carried = layout.carry(source.stored, spec.dtype or None)
        found = _kept(source, spec) if spec.keep_adapters else None
        if found is None:
            check_room(dst, _size(source.stored, spec.dtype))
        with making(dst) as target:
            with watched("written", source.stored) as stored:
                dtype = spec.dtype or None
                manifest = fill(to, target.folder, stored, source.manifest, dtype=dtype, found=found)
            durable.write_text(target.folder / "README.md", card(manifest, carried, dst.name))
            proof = dict(UNPROVED)
            if spec.proof:
                proof = proof_of(source, carried, target.folder, manifest, dtype=spec.dtype, spec=spec)
            write_model_manifest(target.folder, manifest.but(proved=proof["proved"]))
            proof |= {"from": source.layout, "to": to, "seconds": round(time.perf_counter() - begin, 2)}
            target.end(proof, failed=spec.proof and not proof["proved"])
    return proof | {"at": str(target.at)}


def _source(src: Path | str) -> Path:
    path = local_model(str(src), field="SRC")
    if not path.exists():
        raise ValueError(f"SRC={src} does not exist; give a checkpoint that is here")
    if (path / "manifest.json").is_file():
        read_model_manifest(path, field="SRC")  # which says so if it is a run without an export
    return path


_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "q8_0": 1.1, "q5_0": 0.75, "q4_0": 0.65}
_BYTES |= {"q5_k_m": 2.8, "q4_k_m": 2.7}
"""A number takes in each type, about; a mixture that llama.cpp makes lies beside what it is made of."""


def _size(stored: StoredModel, dtype: str) -> float:
    """Return about how many bytes a model takes."""
    return sum(math.prod(held.shape) * _BYTES.get(dtype, held.dtype.itemsize) for held in stored.weights.values())


def explain(src: Path | str, *, to: str, spec: ConvertSpec | None = None) -> Iterator[tuple[str, str, str, str]]:
    """Yield (name in DST, shape and type, name in SRC, what is done to it) of every tensor, none of them read."""
    spec = spec or ConvertSpec()
    if spec.part or spec.keep_adapters:
        raise ValueError("--explain tells of whole models with adapters merged; leave part and --keep-adapters out")
    path = _source(src)
    with tempfile.TemporaryDirectory(prefix="rayllava-") as scratch:
        source = open_source(path, spec, scratch=Path(scratch), exact=bool(spec.dtype))
        for name, held in _layout(to, spec).named(source.stored, spec.dtype or None).items():
            begin, *steps = trail_of(held) or ("-",)
            yield name, f"{dtype_name(held.dtype)} {held.shape}", begin, ", ".join(steps) or "as it is"


def _layout(to: str, spec: ConvertSpec) -> Layout:
    """Return the layout of that key; ValueError when there is none, or it does not write the type."""
    if to not in LAYOUTS:
        raise ValueError(f"to={to} is no layout; there are: {', '.join(LAYOUTS)}")
    layout = LAYOUTS[to]
    if spec.dtype and spec.dtype not in layout.rounding:
        known = ", ".join(filter(None, layout.rounding))
        raise ValueError(f"dtype={spec.dtype} is not written in this layout; there are: {known}")
    return layout


def _kept(source: Source, spec: ConvertSpec) -> Found:
    """Return what the checkpoint holds, adapters apart; ValueError when that cannot be."""
    if source.found is None or not any(weight.adapter for weight in source.found.weights):
        raise ValueError("SRC holds no adapters; leave --keep-adapters out")
    if spec.dtype:
        raise ValueError("--keep-adapters leaves every tensor as it is; leave --dtype out")
    return source.found
