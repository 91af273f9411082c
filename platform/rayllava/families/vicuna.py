"""Vicuna 1.5: Llama 2 taught to converse; the language model of LLaVA-v1.5 and InternVL-Chat."""

from __future__ import annotations

from rayllava.families import Family

PLUG = Family(
    template="vicuna_v1",
    stop_tokens=("</s>",),
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    model_type="llama",
)
