"""LLaVA-Llama-3-8B and v1.1: Llama 3 Instruct with CLIP, trained as XTuner does it."""

from __future__ import annotations

from rayllava.recipe import Full, ModelSpec, QLoRA, Recipe, TowerLoRA
from rayllava.recipes import _xtuner
from rayllava.recipes._origin import reproduces

_MODEL = ModelSpec(llm="meta-llama/Meta-Llama-3-8B-Instruct", vision=_xtuner.CLIP, family="llama3")


@reproduces("XTuner", "llava_llama3_8b_instruct_clip_vit_large_p14_336_e1_gpu8_pretrain.py", data="558k")
def pretrain_8b() -> Recipe:
    """Stage 1: 2181 steps."""
    return _xtuner.pretrain(_MODEL, template="llama3_chat", quant="none").but(seed=1024)


@reproduces("XTuner", "llava_llama3_8b_instruct_full_clip_vit_large_p14_336_e1_gpu8_finetune.py", data="mix665k")
def finetune_8b() -> Recipe:
    """Stage 2 under a frozen tower: 5198 steps."""
    return _xtuner.cut(_xtuner.finetune(pretrain_8b), per_device=8, accumulation=2)


@reproduces("XTuner", "llava_llama3_8b_instruct_full_clip_vit_large_p14_336_lora_e1_gpu8_finetune.py", data="mix665k")
def finetune_8b_tower_lora() -> Recipe:
    """Stage 2 of LLaVA-Llama-3-8B, with a LoRA on the tower: 5198 steps."""
    return finetune_8b().but(tuning=Full(vision=TowerLoRA(r=64, alpha=16)))


@reproduces(
    "XTuner", "llava_llama3_8b_instruct_clip_vit_large_p14_336_e1_gpu8_sharegpt4v_pretrain.py", data="sharegpt4v"
)
def pretrain_8b_sharegpt4v() -> Recipe:
    """Stage 1 of LLaVA-Llama-3-8B-v1.1: 4871 steps."""
    return _xtuner.sharegpt4v(pretrain_8b())


@reproduces(
    "XTuner",
    "llava_llama3_8b_instruct_full_clip_vit_large_p14_336_lora_e1_gpu8_internvl_finetune.py",
    data="internvl_sft",
)
def finetune_8b_internvl() -> Recipe:
    """Stage 2 of LLaVA-Llama-3-8B-v1.1, with a LoRA on the tower: 9905 steps."""
    full = _xtuner.finetune(pretrain_8b_sharegpt4v).but(tuning=Full(vision=TowerLoRA(r=64, alpha=16)))
    return _xtuner.cut(full, per_device=4, accumulation=4)


@reproduces("XTuner", "llava_llama3_8b_instruct_quant_clip_vit_large_p14_336_e1_gpu1_pretrain.py", data="558k")
def pretrain_8b_one_gpu() -> Recipe:
    """Stage 1 under an NF4 language model on one GPU: 2181 steps."""
    return _xtuner.one_gpu(_xtuner.pretrain(_MODEL, template="llama3_chat", quant="nf4").but(seed=1024))


@reproduces("XTuner", "llava_llama3_8b_instruct_qlora_clip_vit_large_p14_336_e1_gpu1_finetune.py", data="mix665k")
def qlora_8b_one_gpu() -> Recipe:
    """Stage 2, a smaller QLoRA under a frozen tower on one GPU: 5198 steps."""
    return _xtuner.one_gpu(_xtuner.qlora(pretrain_8b_one_gpu).but(tuning=QLoRA(r=64, alpha=16)))
