"""Llama-2-chat: Vicuna's layers under Meta's own prompt."""

from __future__ import annotations

from dataclasses import replace

from rayllava.families import vicuna

PLUG = replace(vicuna.PLUG, template="llava_llama_2")
