"""LLaVA-Phi-3-mini: Phi-3-mini-4k with CLIP, trained as XTuner does it."""

from __future__ import annotations

from rayllava.recipe import Full, ModelSpec, Recipe, TowerFull
from rayllava.recipes import _xtuner
from rayllava.recipes._origin import reproduces

_MODEL = ModelSpec(llm="microsoft/Phi-3-mini-4k-instruct", vision=_xtuner.CLIP, family="phi3")


@reproduces("XTuner", "llava_phi3_mini_4k_instruct_clip_vit_large_p14_336_e1_gpu8_pretrain.py", data="558k")
def pretrain_mini() -> Recipe:
    """Stage 1: 2181 steps."""
    return _xtuner.pretrain(_MODEL, template="phi3_chat", quant="none").but(seed=1024)


@reproduces("XTuner", "llava_phi3_mini_4k_instruct_full_clip_vit_large_p14_336_e1_gpu8_finetune.py", data="mix665k")
def finetune_mini() -> Recipe:
    """Stage 2 under a frozen tower: 5198 steps."""
    return _xtuner.cut(_xtuner.finetune(pretrain_mini), per_device=8, accumulation=2)


@reproduces(
    "XTuner", "llava_phi3_mini_4k_instruct_clip_vit_large_p14_336_e1_gpu8_sharegpt4v_pretrain.py", data="sharegpt4v"
)
def pretrain_mini_sharegpt4v() -> Recipe:
    """Stage 1 of LLaVA-Phi-3-mini: 4871 steps."""
    return _xtuner.sharegpt4v(pretrain_mini())


@reproduces(
    "XTuner",
    "llava_phi3_mini_4k_instruct_full_clip_vit_large_p14_336_full_e2_gpu8_internvl_finetune.py",
    data="internvl_sft",
)
def finetune_mini_internvl() -> Recipe:
    """Stage 2 of LLaVA-Phi-3-mini, the tower in full, two epochs: 19810 steps."""
    full = _xtuner.cut(_xtuner.finetune(pretrain_mini_sharegpt4v), per_device=8, accumulation=2)
    return full.but(tuning=Full(vision=TowerFull()), data=full.data.but(epochs=2))
