"""A LLaVA as layouts hold it that know Llama and CLIP alone, without rows for <image> and <pad>."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from rayllava.checkpoint.layouts import StoredModel, in_whole, part_of
from rayllava.checkpoint.layouts._words import part_words
from rayllava.checkpoint.remap import AS_LLAMA, Remap
from rayllava.checkpoint.weights import Computed, Held, trail_of

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def as_llama(stored: StoredModel, *, layout: str) -> StoredModel:
    """Return the model with a Llama for its language model; ValueError when it computes what no Llama does."""
    text = stored.config.text_config
    if text.model_type == "llama":
        return stored
    remap = AS_LLAMA.get(text.model_type)
    if remap is None:
        raise ValueError(
            f"to={layout} holds language models of the Llama kind alone, and this one is {text.model_type}; use to=hf"
        )
    from transformers import LlamaConfig

    window = getattr(text, "sliding_window", None)
    if window and window < text.max_position_embeddings:
        log.warning("to=%s: the model looks back %d tokens at most, as a Llama it sees all of them", layout, window)
    words = part_words(text, "float32")
    config = copy.deepcopy(stored.config)
    config.text_config = LlamaConfig(**remap.config(words))
    weights: dict[str, Held] = {}
    for name, held in stored.weights.items():
        part, inner = part_of(name)
        weights |= _taken_apart(inner, held, remap, words) if part == "llm" else {name: held}
    return dataclasses.replace(stored, config=config, weights=weights)


def check_clip(stored: StoredModel, *, layout: str, why: str) -> None:
    """Raise ValueError unless the tower is a CLIP, which is all that a layout holds."""
    kind = stored.config.vision_config.model_type
    if kind != "clip_vision_model":
        raise ValueError(f"to={layout} holds CLIP towers alone, and this one is {kind}: {why}; use to=hf")


def _taken_apart(name: str, held: Held, remap: Remap, words: dict[str, object]) -> dict[str, Held]:
    import torch

    shapes = dict(remap.tensor(name, torch.empty(held.shape, device="meta"), words))

    def part(key: str) -> Callable[[], Tensor]:
        return lambda: dict(remap.tensor(name, held.read(), words))[key]

    return {
        in_whole("llm", key): Computed(
            tuple(shape.shape),
            held.dtype,
            part(key),
            trail_of(held, *(["rows taken out"] if len(shapes) > 1 else [])),
        )
        for key, shape in shapes.items()
    }
