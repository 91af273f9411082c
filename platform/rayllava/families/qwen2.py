"""Qwen2- and Qwen2.5-Instruct: ChatML, no token that begins a text, biases on query, key and value."""

from __future__ import annotations

from dataclasses import replace

from rayllava.families import vicuna

PLUG = replace(vicuna.PLUG, template="qwen_chat", stop_tokens=("<|im_end|>", "<|endoftext|>"), model_type="qwen2")
