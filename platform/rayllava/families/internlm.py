"""InternLM-chat (the first): Llama with a bias on every attention projection."""

from __future__ import annotations

from dataclasses import replace

from rayllava.families import vicuna

PLUG = replace(vicuna.PLUG, template="internlm_chat", stop_tokens=("<eoa>",), remap="internlm")
