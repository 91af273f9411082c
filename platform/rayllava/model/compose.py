"""Parts, and what a checkpoint holds of them -> StoredModel: every tensor known by shape, none read yet.

parts' folders    translated where a part came with code of its own, a tower's positions fitted to the pictures
+ checkpoint      what it holds whole in their place, adapters added in float32 and rounded once
+ new rows        those of <image> and <pad>, the mean of the old ones, where the tokenizer gained them
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayllava.checkpoint.layouts import LAYOUTS, TABLES, Found, Own, Part, StoredModel, Weight, part_of
from rayllava.checkpoint.parts import is_whole, read_llm_config, read_tower_config
from rayllava.checkpoint.weights import Computed, Held, open_weights, trail_of, weight_files
from rayllava.model.build import empty, padded_rows
from rayllava.model.foreign import Words, translated
from rayllava.model.parts import POSITIONS, interpolated, llm_config_of, tower_config
from rayllava.recipe import ModelSpec, ProcessorSpec

Shapes = dict[str, tuple[int, ...]]
"""Of the model's tensors, by canonical name."""

_CURES: dict[Part, str] = {
    "llm": "give as --base the language model that it was trained from",
    "vision": "give as --vision-tower the tower that it was trained with",
    "projector": "a projector of two layers is wanted, made for this language model and tower",
}


def compose(
    found: Found,
    own: Own,
    model: ModelSpec,
    processor: ProcessorSpec,
    tokenizer_dir: Path,
    *,
    exact: bool,
    said: str,
) -> StoredModel:
    """Return the whole model of a checkpoint; `model` names the folders of its parts.

    Weights that adapters were added to are float32 if they are to be `exact`, else of the type they had. Raises
    ValueError, beginning with `said`, when something is missing, strange or of another shape.
    """
    llm, vision = Path(model.llm), Path(model.vision)
    words = own.words or read_llm_config(llm, family=model.family)
    kinds: Words = {"llm": words, "vision": read_tower_config(vision)}
    text = llm_config_of(words)
    num_own = text.vocab_size
    text.vocab_size = padded_rows(processor, num_own)
    llava = empty(model, processor, text, tower_config(vision, size=processor.image_size))
    shapes = {name: tuple(tensor.shape) for name, tensor in llava.state_dict().items()}
    whole = {weight.part for weight in found.weights if not weight.adapter}

    weights: dict[str, Held] = {}
    bases: dict[Part, Path] = {"llm": llm, "vision": vision}
    for part, folder in bases.items():
        if part not in whole:
            base = ((name, held) for weight in _weights(folder, part) for name, held in _lazily(weight, kinds))
            weights |= {name: held for name, held in base if name in shapes}  # a whole CLIP holds more
    _lay(weights, found, None if found.translated else kinds, shapes, exact=exact, said=said)
    _settle(weights, shapes, num_own=num_own, tied=text.tie_word_embeddings, said=said)
    ordered = {name: weights[name] for name in shapes if name in weights}
    return StoredModel(llava.config, ordered, tokenizer_dir, ordered[TABLES[0]].dtype, num_own)


def check_whole(stored: StoredModel, *, said: str) -> None:
    """Raise ValueError, beginning with `said`, unless a model has every tensor in the shape that its config says."""
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in LlavaForConditionalGeneration(stored.config).named_parameters()}
    tied = stored.config.text_config.tie_word_embeddings
    for name, shape in shapes.items():
        held = stored.weights.get(name)
        if held is None and not (tied and name == TABLES[1]):
            raise ValueError(f"{said} lacks {name} {shape}; give a whole model")
        if held is not None and held.shape != shape:
            raise ValueError(f"{said}: {name} is {held.shape}, its config says {shape}; give a whole model")
    if strange := sorted(stored.weights.keys() - shapes.keys() - {TABLES[1]}):
        raise ValueError(f"{said}: {strange[0]} is nothing that its config has; give a whole model")


def compose_part(
    part: Part, found: Found, folder: Path, words: dict[str, Any], *, shapes: Shapes, exact: bool, said: str
) -> dict[str, Held]:
    """Return the tensors of one part, by canonical name: those of its `folder`, a checkpoint's laid over them.

    `words` are those of the part's config.json, `shapes` those of its class; errors as in `compose`.
    """
    weights = tuple(weight for weight in found.weights if weight.part == part)
    laid: dict[str, Held] = {}
    if all(weight.adapter for weight in weights):
        kinds: Words | None = None if is_whole(folder) else {part: words}
        base = ((name, held) for weight in _weights(folder, part) for name, held in _lazily(weight, kinds))
        laid = {name: held for name, held in base if name in shapes}
    over = dataclasses.replace(found, weights=weights)
    _lay(laid, over, None if found.translated else {part: words}, shapes, exact=exact, said=said)
    for name, shape in shapes.items():
        held = laid.get(name)
        if held is not None and name in TABLES and held.shape[0] > shape[0]:  # rows of <image> and <pad>
            held = laid[name] = _extended(held, shape[0], shape[0])
        if held is None or held.shape != shape:
            raise ValueError(f"{said}: {name} is {held and held.shape}, the model has {shape}; {_CURES[part]}")
    return {name: laid[name] for name in shapes}


def _lay(
    weights: dict[str, Held], found: Found, kinds: Words | None, shapes: Shapes, *, exact: bool, said: str
) -> None:
    """Put what a checkpoint holds in the place of what is there, or add it."""
    laid: set[str] = set()
    for weight in found.weights:
        cure = _CURES[weight.part]
        try:
            named = list(_lazily(weight, kinds))
        except ValueError as error:
            raise ValueError(f"{said}: {error}; {cure}") from error
        for name, held in named:
            if name not in shapes:
                raise ValueError(f"{said}: {weight.said} is nothing that the model has; {cure}")
            if name in laid:
                raise ValueError(f"{said} holds {name} twice; give a checkpoint of one model")
            laid.add(name)
            if weight.adapter:
                base = weights.get(name)
                if base is None or base.shape != held.shape:
                    raise ValueError(f"{said}: {weight.said} adds {held.shape} to {base and base.shape}; {cure}")
                held = _sum(base, held, exact=exact)
            weights[name] = held


def _settle(weights: dict[str, Held], shapes: Shapes, *, num_own: int, tied: bool, said: str) -> None:
    """Give every tensor the model's shape: rows for new tokens, positions for larger pictures."""
    for name, shape in shapes.items():
        if name == "lm_head.weight" and tied:
            weights.pop(name, None)
            continue
        if name not in weights:
            raise ValueError(f"{said} lacks {name} {shape}; {_CURES[part_of(name)[0]]}")
        held = weights[name]
        if name in TABLES and held.shape[0] >= num_own and held.shape[1:] == shape[1:]:
            weights[name] = held = _extended(held, num_own, shape[0])
        elif name.endswith(POSITIONS) and held.shape != shape and held.shape[-1] == shape[-1]:
            weights[name] = held = _fitted(held, shape)
        if held.shape != shape:
            raise ValueError(f"{said}: {name} is {held.shape}, the model has {shape}; {_CURES[part_of(name)[0]]}")


def _weights(folder: Path, part: Part) -> Iterator[Weight]:
    """Yield the weights of a part's own folder."""
    if is_whole(folder):
        yield from (one for one in LAYOUTS["hf"].open(folder).weights if one.part == part)
        return
    for path in weight_files(folder, field=f"model.{part}"):
        for said, held in open_weights(path).items():
            name = said.removeprefix("vision_model.") if part == "vision" else said
            yield Weight(part, name, held, said)


def _lazily(weight: Weight, kinds: Words | None) -> Iterator[tuple[str, Held]]:
    """Yield (canonical name, tensor) of what a weight becomes; it is read when one of them is."""
    held = weight.held
    named = list(translated(weight, torch.empty(held.shape, device="meta"), kinds))
    trail = trail_of(held) or (weight.said,)
    for name, shape in named:

        def make(name: str = name) -> Tensor:
            return dict(translated(weight, held.read(), kinds))[name]

        taken = ["rows taken out"] if len(named) > 1 else []
        yield name, Computed(tuple(shape.shape), held.dtype, make, (*trail, *taken))


def _sum(base: Held, product: Held, *, exact: bool) -> Held:
    dtype = torch.float32 if exact else base.dtype
    trail = trail_of(base, f"+ adapter {trail_of(product)[0]}")
    return Computed(base.shape, dtype, lambda: (base.read().float() + product.read()).to(dtype), trail)


def _extended(held: Held, num_own: int, rows: int) -> Held:
    """Return the first `num_own` rows of a table, and then as many of their mean as it takes."""
    if held.shape[0] == num_own == rows:
        return held

    def make() -> Tensor:
        table = held.read()[:num_own]
        mean = table.float().mean(0, keepdim=True).to(table.dtype)
        return torch.cat([table, mean.expand(rows - num_own, -1)])

    added = [f"first {num_own} rows"] if held.shape[0] > num_own else []
    added += [f"{rows - num_own} rows of their mean"] if rows > num_own else []
    return Computed((rows, *held.shape[1:]), held.dtype, make, trail_of(held, *added))


def _fitted(held: Held, shape: tuple[int, ...]) -> Held:
    def make() -> Tensor:
        table = held.read().float().reshape(-1, shape[-1])
        return interpolated(table, shape[-2]).reshape(shape).to(held.dtype)

    return Computed(shape, held.dtype, make, trail_of(held, "positions interpolated"))
