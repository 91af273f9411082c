"""Phi-3-mini: fused query-key-value and gate-up projections."""

from __future__ import annotations

from rayllava.families import Family

# The checkpoint names <|endoftext|> as its end, but what the model says at the end of a turn is <|end|>.
PLUG = Family(
    template="phi3_chat",
    stop_tokens=("<|end|>", "<|endoftext|>"),
    lora_targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    model_type="phi3",
)
