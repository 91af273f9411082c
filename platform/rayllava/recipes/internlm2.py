"""LLaVA-InternLM2: InternLM2-chat 1.8B, 7B and 20B with CLIP, trained as XTuner does it."""

from __future__ import annotations

from rayllava.recipe import ModelSpec, Recipe
from rayllava.recipes import _xtuner
from rayllava.recipes._origin import reproduces

_MODEL_7B = ModelSpec(llm="internlm/internlm2-chat-7b", vision=_xtuner.CLIP, family="internlm2")
_MODEL_1_8B = _MODEL_7B.but(llm="internlm/internlm2-chat-1_8b")
_MODEL_20B = _MODEL_7B.but(llm="internlm/internlm2-chat-20b")


@reproduces("XTuner", "llava_internlm2_chat_1_8b_clip_vit_large_p14_336_e1_gpu8_pretrain.py", data="558k")
def pretrain_1_8b() -> Recipe:
    """Stage 1 under an NF4 language model: 2181 steps."""
    return pretrain_7b().but(model=_MODEL_1_8B)


@reproduces(
    "XTuner", "llava_internlm2_chat_1_8b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune.py", data="mix665k"
)
def qlora_1_8b() -> Recipe:
    """Stage 2, QLoRA and a LoRA on the tower: 5198 steps."""
    return _xtuner.qlora(pretrain_1_8b)


@reproduces("XTuner", "llava_internlm2_chat_7b_clip_vit_large_p14_336_e1_gpu8_pretrain.py", data="558k")
def pretrain_7b() -> Recipe:
    """Stage 1 under an NF4 language model: 2181 steps."""
    return _xtuner.pretrain(_MODEL_7B, template="internlm2_chat", quant="nf4")


@reproduces("XTuner", "llava_internlm2_chat_7b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune.py", data="mix665k")
def qlora_7b() -> Recipe:
    """Stage 2, QLoRA and a LoRA on the tower: 5198 steps."""
    return _xtuner.qlora(pretrain_7b)


@reproduces("XTuner", "llava_internlm2_chat_7b_clip_vit_large_p14_336_e1_gpu8_finetune.py", data="mix665k")
def finetune_7b() -> Recipe:
    """Stage 2 of the whole language model: 5198 steps."""
    return _xtuner.cut(_xtuner.finetune(pretrain_7b), per_device=8, accumulation=2)


@reproduces("XTuner", "llava_internlm2_chat_20b_clip_vit_large_p14_336_e1_gpu8_pretrain.py", data="558k")
def pretrain_20b() -> Recipe:
    """Stage 1 under an NF4 language model: 2181 steps."""
    return pretrain_7b().but(model=_MODEL_20B)


@reproduces(
    "XTuner", "llava_internlm2_chat_20b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune.py", data="mix665k"
)
def qlora_20b() -> Recipe:
    """Stage 2, QLoRA and a LoRA on the tower: 5198 steps."""
    return _xtuner.cut(_xtuner.qlora(pretrain_20b), per_device=8, accumulation=2)


@reproduces("XTuner", "llava_internlm2_chat_20b_clip_vit_large_p14_336_e1_gpu8_finetune.py", data="mix665k")
def finetune_20b() -> Recipe:
    """Stage 2 of the whole language model: 5198 steps."""
    return _xtuner.cut(_xtuner.finetune(pretrain_20b), per_device=4, accumulation=4)
