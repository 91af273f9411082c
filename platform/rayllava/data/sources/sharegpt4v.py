"""ShareGPT4V's captions and dialogues: LLaVA's layout under names of its own."""

from __future__ import annotations

from rayllava.data.sources import llava

PLUG = llava.PLUG
