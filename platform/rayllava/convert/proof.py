"""What a conversion compares, and what it makes of that: DST/proof.json."""

from __future__ import annotations

import logging
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rayllava.checkpoint import llamacpp
from rayllava.checkpoint.layouts import LAYOUTS, StoredModel, cannot_read
from rayllava.checkpoint.manifest import ModelManifest, SourceSpec
from rayllava.checkpoint.weights import dtype_name
from rayllava.convert import prove
from rayllava.convert.watch import watched
from rayllava.model.source import Source, open_source

log = logging.getLogger(__name__)

UNPROVED: dict[str, Any] = {"proved": False, "reason": "not asked for: --no-proof"}

_LLAMA_CPP = 2e-2
"""Its attention keeps keys and values in float16: so far may its logits be from torch's in any case, as a share."""
_PASSES = 5
"""Through the whole model, of the fixed prompts."""


def proof_of(
    source: Source, carried: StoredModel, dst: Path, manifest: ModelManifest, *, dtype: str, spec: SourceSpec
) -> dict[str, Any]:
    """Return what was compared between a model and what was made of it, and whether it agrees.

    `carried` is what DST is to hold, in `dtype` if that is set; `spec` names the parts that DST does not hold.
    """
    layout = LAYOUTS[manifest.layout]
    kind = dtype or ("" if "" in layout.rounding else dtype_name(source.stored.dtype))
    share = layout.rounding[kind]
    prompts = prove.fixed_prompts()
    with tempfile.TemporaryDirectory(prefix="rayllava-") as scratch:
        for name in ("look", "read"):
            (Path(scratch) / name).mkdir()
        own = layout.own(dst, Path(scratch) / "look")
        lacking = SourceSpec()
        if layout.read is cannot_read:  # adapters may have been kept apart from their base
            named = {"base": "" if own.llm else spec.base, "vision_tower": "" if own.vision else spec.vision_tower}
            lacking = SourceSpec(**named)
        written = open_source(dst, lacking, scratch=Path(scratch) / "read", field="DST")
        with watched("compared", carried) as wanted:
            proof = prove.compare_tensors(wanted, written.stored, tolerance=layout.tolerance.get(kind, 0.0))
        with watched("asked SRC", source.stored, times=_PASSES) as stored:
            ours = prove.our_side(stored, source.manifest.processor, prompts)
        if manifest.layout == "hf":
            log.info("asking DST through transformers alone: %s", ", ".join(prompt.name for prompt in prompts))
            theirs = prove.plain_side(dst, prompts, ours)
        else:
            with watched("asked DST", written.stored, times=_PASSES) as stored:
                theirs = prove.our_side(stored, written.manifest.processor, prompts)
        rows = min(source.stored.num_own_rows, written.stored.num_own_rows)
    found = prove.compare_logits(prompts, ours, theirs, rows=rows)
    for row in found.values():
        row["bound"] = share * max(row["max_abs_logit"], 1.0)
        row["proved"] = row["max_abs_logit_diff"] <= row["bound"] and row["max_abs_pixel_diff"] <= 1e-6
    proof["prompts"] = found
    proof["max_abs_logit_diff"] = {name: row["max_abs_logit_diff"] for name, row in found.items()}
    proof["bounds"] = {name: row.pop("bound") for name, row in found.items()}
    proof["dtype"] = kind or dtype_name(carried.dtype)
    proof["proved"] = proof["tensors_agree"] and all(row["proved"] for row in found.values())
    if manifest.layout == "gguf" and llamacpp.installed():
        ran = _in_llama_cpp(dst / next(iter(manifest.files)), theirs[0], share=max(share, _LLAMA_CPP), rows=rows)
        proof |= {"llama_cpp": ran, "proved": proof["proved"] and ran["proved"]}
    return proof


def _in_llama_cpp(path: Path, seen: prove.Seen, *, share: float, rows: int) -> dict[str, Any]:
    """Return how far llama.cpp's own logits of a prompt of words are from those of what was read back."""
    last = llamacpp.logits_of(path, seen.ids.tolist())[-len(seen.logits) :, :rows]
    want = seen.logits[:, :rows].numpy()
    bound = share * max(float(abs(want).max()), 1.0)
    apart = float(abs(last - want).max())
    said = {"version": version("llama-cpp-python"), "max_abs_logit_diff": apart, "bound": bound}
    return said | {"proved": apart <= bound}
