"""SRC --open_source--> StoredModel --fill--> DST --prove--> DST/proof.json

DST is written beside its place, proved there, and renamed: who sees it sees all of it, with its proof.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from rayllava import durable
from rayllava.checkpoint import llamacpp
from rayllava.checkpoint.layouts import LAYOUTS, Found, Layout, StoredModel, detect, fill
from rayllava.checkpoint.manifest import ModelManifest, SourceSpec, local_model
from rayllava.checkpoint.shards import num_bytes
from rayllava.checkpoint.weights import Held, dtype_name, trail_of
from rayllava.convert import prove
from rayllava.convert.card import card
from rayllava.convert.part import write_part
from rayllava.model.source import Source, open_source
from rayllava.progress import Progress

log = logging.getLogger(__name__)

_SHORT = {"f32": "float32", "fp32": "float32", "f16": "float16", "fp16": "float16", "bf16": "bfloat16"}


_LLAMA_CPP = 2e-2
"""Its attention keeps keys and values in float16: so far may its logits be from torch's in any case, as a share."""

_UNPROVED: dict[str, Any] = {"proved": False, "reason": "not asked for: --no-proof"}


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
    """Write the model in `src` to `dst` in another layout and return the proof, which dst/proof.json holds too.

    The proof's `proved` says whether `dst` may be relied on: nothing is when it was not to be proved.
    """
    begin = time.perf_counter()
    spec = spec or ConvertSpec()
    layout = _layout(to, spec)
    src = local_model(str(src), field="SRC")
    if not spec.part:
        detect(src, field="SRC")
    _check_free(dst, src, force=spec.force)
    with tempfile.TemporaryDirectory(prefix="rayllava-") as scratch:
        if spec.part:
            proof = _part(src, dst, to, spec, Path(scratch))
            proof["seconds"] = round(time.perf_counter() - begin, 2)
            return proof
        source = open_source(src, spec, scratch=Path(scratch), exact=bool(spec.dtype))
        carried = layout.carry(source.stored, spec.dtype or None)
        found = _kept(source, spec) if spec.keep_adapters else None
        with durable.new_dir(dst) as beside:
            with _progress("written", source.stored) as watched:
                manifest = fill(to, beside, watched, source.manifest, dtype=spec.dtype or None, found=found)
            durable.write_text(beside / "README.md", card(manifest, carried, dst.resolve().name))
            proof = dict(_UNPROVED)
            if spec.proof:
                kind = spec.dtype or ("" if "" in layout.rounding else dtype_name(source.stored.dtype))
                proof = _prove(
                    source,
                    carried,
                    beside,
                    manifest,
                    spec,
                    share=layout.rounding[kind],
                    tolerance=layout.tolerance.get(kind, 0.0),
                )
                proof["dtype"] = kind or dtype_name(carried.dtype)
            proof |= {"from": source.layout, "to": to, "seconds": round(time.perf_counter() - begin, 2)}
            durable.write_json(beside / "proof.json", proof)
    return proof


def _part(src: Path, dst: Path, to: str, spec: ConvertSpec, scratch: Path) -> dict[str, Any]:
    """Write one part of a model to `dst` and return the proof."""
    assert spec.part
    with durable.new_dir(dst) as beside:
        prove_it = write_part(src, beside, part=spec.part, to=to, spec=spec, dtype=spec.dtype, scratch=scratch)
        proof = prove_it() if spec.proof else dict(_UNPROVED)
        proof |= {"to": to, "part": spec.part}
        durable.write_json(beside / "proof.json", proof)
    return proof


def explain(src: Path | str, *, to: str, spec: ConvertSpec | None = None) -> Iterator[tuple[str, str, str, str]]:
    """Yield (name in DST, shape and type, name in SRC, what is done to it) of every tensor, none of them read."""
    spec = spec or ConvertSpec()
    src = local_model(str(src), field="SRC")
    with tempfile.TemporaryDirectory(prefix="rayllava-") as scratch:
        source = open_source(src, spec, scratch=Path(scratch), exact=bool(spec.dtype))
        for name, held in _layout(to, spec).named(source.stored, spec.dtype or None).items():
            begin, *steps = trail_of(held)
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


def _prove(
    source: Source,
    carried: StoredModel,
    dst: Path,
    manifest: ModelManifest,
    spec: SourceSpec,
    *,
    share: float,
    tolerance: float,
) -> dict[str, Any]:
    """Return what was compared, and whether it agrees; logits may be apart by a `share` of the largest.

    `spec` names the parts that DST does not hold.
    """
    prompts = prove.fixed_prompts()
    with tempfile.TemporaryDirectory(prefix="rayllava-") as scratch:
        for name in ("look", "read"):
            (Path(scratch) / name).mkdir()
        own = LAYOUTS[manifest.layout].own(dst, Path(scratch) / "look")
        lacking = SourceSpec(base="" if own.llm else spec.base, vision_tower="" if own.vision else spec.vision_tower)
        written = open_source(dst, lacking, scratch=Path(scratch) / "read", field="DST")
        with _progress("compared", carried) as watched:
            proof = prove.compare_tensors(watched, written.stored, tolerance=tolerance)
        log.info("asking SRC, then DST: %s", ", ".join(prompt.name for prompt in prompts))
        ours = prove.our_side(source.stored, source.manifest.processor, prompts)
        if manifest.layout == "hf":
            theirs = prove.plain_side(dst, prompts, ours)
        else:
            theirs = prove.our_side(written.stored, written.manifest.processor, prompts)
        rows = min(source.stored.num_own_rows, written.stored.num_own_rows)
    found = prove.compare_logits(prompts, ours, theirs, rows=rows)
    for row in found.values():
        row["bound"] = share * max(row["max_abs_logit"], 1.0)
        row["proved"] = row["max_abs_logit_diff"] <= row["bound"] and row["max_abs_pixel_diff"] <= 1e-6
    proof["prompts"] = found
    proof["max_abs_logit_diff"] = {name: row["max_abs_logit_diff"] for name, row in found.items()}
    proof["bounds"] = {name: row.pop("bound") for name, row in found.items()}
    proof["proved"] = proof["tensors_agree"] and all(row["proved"] for row in found.values())
    if manifest.layout == "gguf" and llamacpp.installed():
        ran = _in_llama_cpp(dst / next(iter(manifest.files)), theirs[0], share=max(share, _LLAMA_CPP), rows=rows)
        proof |= {"llama_cpp": ran, "proved": proof["proved"] and ran["proved"]}
    return proof


def _kept(source: Source, spec: ConvertSpec) -> Found:
    """Return what the checkpoint holds, adapters apart; ValueError when that cannot be."""
    if source.found is None or not any(weight.adapter for weight in source.found.weights):
        raise ValueError("SRC holds no adapters; leave --keep-adapters out")
    if spec.dtype:
        raise ValueError("--keep-adapters leaves every tensor as it is; leave --dtype out")
    return source.found


def _in_llama_cpp(path: Path, seen: prove.Seen, *, share: float, rows: int) -> dict[str, Any]:
    """Return how far llama.cpp's own logits of a prompt of words are from those of what was read back."""
    last = llamacpp.logits_of(path, seen.ids.tolist())[-len(seen.logits) :, :rows]
    want = seen.logits[:, :rows].numpy()
    bound = share * max(float(abs(want).max()), 1.0)
    apart = float(abs(last - want).max())
    said = {"version": version("llama-cpp-python"), "max_abs_logit_diff": apart, "bound": bound}
    return said | {"proved": apart <= bound}


@contextmanager
def _progress(name: str, stored: StoredModel) -> Iterator[StoredModel]:
    """Yield the model, whose tensors say when they are read, and show how far that is."""
    done = 0
    with Progress("MB") as progress:
        progress.add(name, total=sum(num_bytes(held) for held in stored.weights.values()) // 1_000_000)

        def seen(held: Held) -> None:
            nonlocal done
            done += num_bytes(held)
            progress.at(name, done // 1_000_000)

        yield stored.watched(seen)


def _check_free(dst: Path, src: Path, *, force: bool) -> None:
    """Raise ValueError when writing `dst` would destroy something."""
    if dst.resolve() == src.resolve() or dst.resolve() in src.resolve().parents:
        raise ValueError(f"DST={dst} would overwrite SRC={src}; give another folder")
    if dst.exists() and not dst.is_dir():
        raise ValueError(f"DST={dst} is a file; give a folder")
    if dst.is_dir() and any(dst.iterdir()) and not force:
        raise ValueError(f"DST={dst} is not empty; give another folder, or add --force to replace it")
    durable.check_writable(dst.parent)
