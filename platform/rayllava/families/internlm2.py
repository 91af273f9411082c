"""InternLM2-chat: Llama with query, key and value in one grouped tensor, taken apart when it is read."""

from __future__ import annotations

from dataclasses import replace

from rayllava.families import vicuna

PLUG = replace(vicuna.PLUG, template="internlm2_chat", stop_tokens=("<|im_end|>",), remap="internlm2")
