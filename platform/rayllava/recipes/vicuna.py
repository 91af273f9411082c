"""LLaVA on Vicuna-v1.5 as XTuner trains it: with QLoRA and a LoRA on the tower, or as in LLaVA's own architecture.

Its template writes no system prompt and a `<s>` before every round, so its models are not asked in `vicuna_v1`.
"""

from __future__ import annotations

from rayllava.recipe import LoRA, ModelSpec, Recipe
from rayllava.recipes import _xtuner
from rayllava.recipes._origin import reproduces

_MODEL_7B = ModelSpec(llm="lmsys/vicuna-7b-v1.5", vision=_xtuner.CLIP, family="vicuna")
_MODEL_13B = _MODEL_7B.but(llm="lmsys/vicuna-13b-v1.5")


@reproduces("XTuner", "llava_vicuna_7b_v15_clip_vit_large_p14_336_e1_gpu8_pretrain.py", data="558k")
def pretrain_7b() -> Recipe:
    """Stage 1 under an NF4 language model: 2181 steps."""
    return _xtuner.pretrain(_MODEL_7B, template="vicuna", quant="nf4")


@reproduces("XTuner", "llava_vicuna_7b_v15_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune.py", data="mix665k")
def qlora_7b() -> Recipe:
    """Stage 2, QLoRA and a LoRA on the tower: 5198 steps."""
    return _xtuner.qlora(pretrain_7b)


@reproduces(
    "XTuner",
    "llava_vicuna_7b_v15_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune_refcoco.py",
    data="mix665k_refcoco",
)
def qlora_7b_refcoco() -> Recipe:
    """Stage 2 with boxes to find and to name: 6292 steps."""
    return qlora_7b()


@reproduces("XTuner", "llava_vicuna_7b_v15_clip_vit_large_p14_336_e1_gpu8_finetune.py", data="mix665k")
def finetune_7b() -> Recipe:
    """Stage 2 of the whole language model, a file that XTuner has replaced by official_finetune_7b's: 5198 steps."""
    return _xtuner.finetune(pretrain_7b)


@reproduces("XTuner", "llava_vicuna_13b_v15_clip_vit_large_p14_336_e1_gpu8_pretrain.py", data="558k")
def pretrain_13b() -> Recipe:
    """Stage 1 under an NF4 language model: 2181 steps."""
    return pretrain_7b().but(model=_MODEL_13B)


@reproduces("XTuner", "llava_vicuna_13b_v15_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune.py", data="mix665k")
def qlora_13b() -> Recipe:
    """Stage 2, QLoRA and a LoRA on the tower: 5198 steps."""
    return _xtuner.qlora(pretrain_13b)


@reproduces("XTuner", "llava_v15_7b_pretrain.py", data="558k")
def official_pretrain_7b() -> Recipe:
    """Stage 1 of LLaVA's architecture: 2181 steps."""
    return _xtuner.pretrain(_MODEL_7B, template="vicuna", quant="none")


@reproduces("XTuner", "llava_v15_7b_finetune.py", data="mix665k")
def official_finetune_7b() -> Recipe:
    """Stage 2 of LLaVA's architecture: 5198 steps."""
    return _xtuner.finetune(official_pretrain_7b)


@reproduces("XTuner", "llava_v15_7b_finetune_lora.py", data="mix665k")
def official_lora_7b() -> Recipe:
    """Stage 2 of LLaVA's architecture with LoRA, the projector at the same rate: 5198 steps."""
    full = official_finetune_7b()
    return full.but(tuning=LoRA(r=128, alpha=256), optim=full.optim.but(lr=2e-4))


@reproduces("XTuner", "llava_v15_13b_pretrain.py", data="558k")
def official_pretrain_13b() -> Recipe:
    """Stage 1 of LLaVA's architecture: 2181 steps."""
    return official_pretrain_7b().but(model=_MODEL_13B)


@reproduces("XTuner", "llava_v15_13b_finetune.py", data="mix665k")
def official_finetune_13b() -> Recipe:
    """Stage 2 of LLaVA's architecture: 5198 steps."""
    return official_finetune_7b().but(after="vicuna.official_pretrain_13b")


@reproduces("XTuner", "llava_v15_13b_finetune_lora.py", data="mix665k")
def official_lora_13b() -> Recipe:
    """Stage 2 of LLaVA's architecture with LoRA: 5198 steps."""
    return official_lora_7b().but(after="vicuna.official_pretrain_13b")
