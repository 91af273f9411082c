"""Llama-3-Instruct."""

from __future__ import annotations

from dataclasses import replace

from rayllava.families import vicuna

# Copies of the checkpoint disagree about the end of sequence, so both candidates are named.
PLUG = replace(vicuna.PLUG, template="llama3_chat", stop_tokens=("<|eot_id|>", "<|end_of_text|>"))
