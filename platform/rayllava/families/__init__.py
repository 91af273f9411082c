"""What a family of language models is: one file each.

from rayllava.families import FAMILIES
FAMILIES["vicuna"].template
"""

from __future__ import annotations

from dataclasses import dataclass

from rayllava.shelf import Shelf


@dataclass(frozen=True)
class Family:
    """The facts about a line of language models that no checkpoint carries."""

    template: str
    """Chat template for instruction tuning, a name in rayllava.prompt.chat.TEMPLATES."""
    stop_tokens: tuple[str, ...]
    """Tokens that end an answer, beside the tokenizer's own end of sequence."""
    lora_targets: tuple[str, ...]
    """Leaf names of the linear layers that LoRA adapts."""
    model_type: str
    """`model_type` of the transformers class that runs it."""
    remap: str = ""
    """`model_type` of checkpoints that become that class by translation, see rayllava.checkpoint.remap."""


FAMILIES = Shelf("rayllava.families", Family)
