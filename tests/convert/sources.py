"""Checkpoints that LLaVA's and XTuner's own code wrote, what it takes to read them, and where their logits stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rayllava.convert.run import ConvertSpec

ASSETS = Path(__file__).parents[1] / "assets"


class Source(NamedTuple):
    """A checkpoint, what it takes to read it, and where its logits stand in golden.npz."""

    path: str
    layout: str
    template: str
    base: bool
    tower: bool
    golden: str
    """How the names of its logits begin there."""
    cases: int
    """How many there are: with a picture, with two, with none."""
    bound: float = 1e-4


SOURCES = {
    "llava whole": Source("llava_v15/whole", "llava", "vicuna_v1", False, True, "whole_", 3),
    "llava whole of pickles": Source("llava_v15/whole_bin", "llava", "vicuna_v1", False, True, "whole_", 3),
    "llava tuned": Source("llava_v15/tuned", "llava", "vicuna_v1", False, True, "tuned_", 3),
    "llava projector": Source("llava_v15/pretrain", "llava", "vicuna_v1", True, True, "pretrain_", 1),
    # LLaVA's own model with and without its adapters merged differs as much.
    "llava lora": Source("llava_v15/lora", "llava", "vicuna_v1", True, True, "lora_", 1, 1.4e-4),
    "xtuner adapters": Source("xtuner_internlm2/folder", "xtuner", "internlm2_chat", True, True, "folder_", 2),
    "xtuner pth of adapters": Source("xtuner_internlm2/iter_4.pth", "xtuner", "internlm2_chat", True, True, "", 2),
    "xtuner pth": Source("xtuner_llama3/iter_4.pth", "xtuner", "llama3_chat", True, True, "", 2),
    "xtuner half adapters": Source("xtuner_llama3/folder", "xtuner", "llama3_chat", False, True, "folder_", 2),
    "llava of xtuner": Source("xtuner_llama3/expected_official", "llava", "llama3_chat", False, True, "folder_", 2),
    "xtuner whole": Source("xtuner_phi3/folder", "xtuner", "phi3_chat", False, False, "folder_", 2),
}


def asked(source: Source, **more: Any) -> ConvertSpec:
    parts = (ASSETS / source.path).parent
    given = {"base": str(parts / "llm")} if source.base else {}
    given |= {"vision_tower": str(parts / "vision")} if source.tower else {}
    return ConvertSpec(template=source.template, **given, **more)
