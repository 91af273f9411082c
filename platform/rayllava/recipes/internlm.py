"""LLaVA-InternLM: InternLM-chat 7B with CLIP, trained as XTuner does it."""

from __future__ import annotations

from rayllava.recipe import ModelSpec, Recipe
from rayllava.recipes import _xtuner
from rayllava.recipes._origin import reproduces

_MODEL = ModelSpec(llm="internlm/internlm-chat-7b", vision=_xtuner.CLIP, family="internlm")


@reproduces("XTuner", "llava_internlm_chat_7b_clip_vit_large_p14_336_e1_gpu8_pretrain.py", data="558k")
def pretrain_7b() -> Recipe:
    """Stage 1 under an NF4 language model: 2181 steps."""
    return _xtuner.pretrain(_MODEL, template="internlm_chat", quant="nf4")


@reproduces("XTuner", "llava_internlm_chat_7b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune.py", data="mix665k")
def qlora_7b() -> Recipe:
    """Stage 2, QLoRA and a LoRA on the tower: 5198 steps."""
    return _xtuner.qlora(pretrain_7b)
