"""Tensor names of Hugging Face LLaVA folders, which come in four spellings.

    file of transformers <= 4.51     language_model.model.*        vision_tower.vision_model.*        written here
    file of 4.52 and later           model.language_model.*        model.vision_tower.vision_model.*
    in the memory of 5.x             model.language_model.*        model.vision_tower.*               canonical
    file of 5.x, model made there    language_model.model.*        vision_tower.*

Every third-party reader (vLLM, llama.cpp's scripts, transformers 4) knows the first.
"""

from __future__ import annotations

_TO_CANONICAL = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
"""Tried in this order; a name that none fits is canonical already."""

_PREFIXED_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Kinds of tower whose published files say `vision_model.`; others never did."""

COMPUTED = ("embeddings.position_ids", ".rotary_emb.inv_freq")
"""Buffers that old files hold and the model computes."""


def canonical(name: str) -> str | None:
    """Return the canonical form of a name in a file; None for what is not read."""
    if name.endswith(COMPUTED):
        return None
    for old, new in _TO_CANONICAL:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def published(name: str, tower: str) -> str:
    """Return the name in a file for a canonical one; `tower` is the model_type of the vision config."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    if name.startswith("model.vision_tower."):
        infix = "vision_model." if tower in _PREFIXED_TOWERS else ""
        return f"vision_tower.{infix}" + name.removeprefix("model.vision_tower.")
    assert name.startswith("model.multi_modal_projector."), f"{name} is no canonical name"
    return name.removeprefix("model.")
