"""One part of a model alone: its language model, its tower, or its projector.

SRC    a checkpoint of any layout; or a part's own folder, as it is or as peft's adapter on one
DST    llm        a folder of transformers' class (hf, xtuner), or of a Llama (llava)
       vision     a folder of transformers' class (hf, xtuner)
       projector  mm_projector.bin (llava), projector/ (xtuner)
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

from rayllava import durable
from rayllava.checkpoint.layouts import (
    LAYOUTS,
    Found,
    Own,
    Part,
    StoredModel,
    Weight,
    cannot_read,
    detect,
    in_whole,
    part_of,
)
from rayllava.checkpoint.layouts._adapters import product, read_adapter
from rayllava.checkpoint.layouts._llama import as_llama
from rayllava.checkpoint.layouts._projector import sequence_name
from rayllava.checkpoint.layouts._words import llm_words, part_words
from rayllava.checkpoint.manifest import SourceSpec
from rayllava.checkpoint.parts import TOWERS, is_whole, read_llm_config, read_tower_config
from rayllava.checkpoint.shards import raw, write_weights
from rayllava.checkpoint.weights import Held, dtype_name, open_weights, read_config, weight_files
from rayllava.convert.watch import watched
from rayllava.families import FAMILIES
from rayllava.model.compose import compose_part
from rayllava.model.parts import llm_config_of, tower_config
from rayllava.model.source import base_folder, tower_folder
from rayllava.model.streamed import streamed_module

_TARGETS: dict[Part, tuple[str, ...]] = {
    "llm": ("hf", "xtuner", "llava"),
    "vision": ("hf", "xtuner"),
    "projector": ("xtuner", "llava"),
}
_WORD_FILES: tuple[str, ...] = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "*.jinja",
)
_PICTURE_FILES: tuple[str, ...] = ("preprocessor_config.json",)
"""What lies beside a part's weights and is taken along, as patterns."""
_IDS = [[1, 2, 3, 5, 8, 13, 21, 34, 55, 89], list(range(7, 39))]
"""Made-up texts whose logits are compared; every vocabulary has such rows."""


@dataclass(frozen=True)
class _Piece:
    """A part with the class that computes it."""

    config: Any
    weights: dict[str, Held]
    """By the names of the class."""
    kind: Any
    """The class."""


def write_part(
    src: Path, folder: Path, *, part: Part, to: str, spec: SourceSpec, dtype: str, scratch: Path
) -> Callable[[], dict[str, Any]]:
    """Write one part of a model into an empty folder; return what proves it, to be called when it is written.

    Raises ValueError, before anything is written, when SRC has no such part or `to` no place for one.
    """
    if to not in _TARGETS[part]:
        raise ValueError(f"to={to} has no place for part={part} alone; there are: {', '.join(_TARGETS[part])}")
    found, own, alone = _looked(src, part, scratch)
    weights = [weight for weight in found.weights if weight.part == part]
    if part == "projector":
        return _write_projector(folder, weights, to, dtype, src)
    base = alone or _base(src, part, own, spec)
    piece = _piece(part, found, base, own, spec, exact=bool(dtype), said=f"SRC={src}")
    written = _cast(_llama(piece) if to == "llava" else piece, dtype)
    with watched("written", _stored(written.weights)) as stored:
        _write(folder, part, dataclasses.replace(written, weights=dict(stored.weights)), base)
    return lambda: _proof(part, piece, written, folder, rounded=dtype)


def _looked(src: Path, part: Part, scratch: Path) -> tuple[Found, Own, Path | None]:
    """Return what a checkpoint holds and says; the folder itself where it is a part alone."""
    if (src / "adapter_config.json").is_file() and not (src / "non_lora_trainables.bin").is_file():
        files, adapters = read_adapter(src)
        weights = [
            Weight(part, name.removeprefix("vision_model."), product(one), said, one) for name, said, one in adapters
        ]
        return Found(tuple(files), tuple(weights)), Own(), None
    kinds = {kind for family in FAMILIES.values() for kind in (family.model_type, family.remap)} | TOWERS.keys()
    layouts = [key for key, layout in LAYOUTS.items() if layout.detect(src)]
    if not layouts and read_config(src).get("model_type") in kinds:
        return Found((), ()), Own(), src
    layout = detect(src, field="SRC")
    whole = LAYOUTS[layout].read is not cannot_read
    return LAYOUTS[layout].open(src, field="SRC"), LAYOUTS[layout].own(src, scratch), src if whole else None


def _base(src: Path, part: Part, own: Own, spec: SourceSpec) -> Path:
    return base_folder(src, own, spec, field="SRC") if part == "llm" else tower_folder(src, own, spec, field="SRC")


def _piece(part: Part, found: Found, base: Path, own: Own, spec: SourceSpec, *, exact: bool, said: str) -> _Piece:
    """Return a part with what a checkpoint holds of it laid over its base."""
    if part == "llm":
        words = own.words or read_llm_config(base, family=spec.family or _family(base))
        config = llm_config_of(words)
        kind: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    else:
        words = read_tower_config(base)
        config = tower_config(base)
        kind = getattr(transformers, TOWERS[words["model_type"]])
    with torch.device("meta"):
        shapes = {in_whole(part, name): tuple(p.shape) for name, p in kind(config).named_parameters()}
    laid = compose_part(part, found, base, words, shapes=shapes, exact=exact, said=said)
    return _Piece(config, {part_of(name)[1]: held for name, held in laid.items()}, kind)


def _family(folder: Path) -> str:
    config = read_config(folder)
    kind = config.get("text_config", {}).get("model_type") if is_whole(folder) else config.get("model_type")
    for key, family in FAMILIES.items():
        if kind in (family.model_type, family.remap):
            return key
    raise ValueError(f"{folder} is of type {kind}, which is no language model here; see family=NAME")


def _llama(piece: _Piece) -> _Piece:
    stored = StoredModel(
        SimpleNamespace(text_config=piece.config),
        {in_whole("llm", name): held for name, held in piece.weights.items()},
        Path(),
        torch.float32,
        piece.config.vocab_size,
    )
    held = as_llama(stored, layout="llava")
    config = held.config.text_config
    kind: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return _Piece(config, {part_of(name)[1]: one for name, one in held.weights.items()}, kind)


def _cast(piece: _Piece, dtype: str) -> _Piece:
    if not dtype:
        return piece
    return dataclasses.replace(piece, weights=dict(_stored(piece.weights).cast(getattr(torch, dtype)).weights))


def _stored(weights: Mapping[str, Held]) -> StoredModel:
    """Return tensors as if they were a model."""
    return StoredModel(None, weights, Path(), torch.float32, 0)


def _write(folder: Path, part: Part, piece: _Piece, base: Path) -> None:
    dtype = dtype_name(next(iter(piece.weights.values())).dtype)
    if part == "llm":
        durable.write_json(folder / "config.json", llm_words(piece.config, dtype))
        names = _WORD_FILES
        write_weights(folder, piece.weights)
    else:
        kind = TOWERS[piece.config.model_type]
        durable.write_json(folder / "config.json", part_words(piece.config, dtype) | {"architectures": [kind]})
        names = _PICTURE_FILES
        prefix = "vision_model." if piece.config.model_type in ("clip_vision_model", "siglip_vision_model") else ""
        write_weights(folder, {f"{prefix}{name}": held for name, held in piece.weights.items()})
    for pattern in names:
        for path in sorted(base.glob(pattern)):
            shutil.copyfile(path, folder / path.name)


def _proof(part: Part, source: _Piece, written: _Piece, folder: Path, *, rounded: str) -> dict[str, Any]:
    """Return how far the part in SRC and the one in DST are apart."""
    held = {name: one for file in weight_files(folder, field="DST") for name, one in open_weights(file).items()}
    held = {name.removeprefix("vision_model."): one for name, one in held.items()}
    different = [name for name, one in written.weights.items() if not _same(one, held.get(name))]
    equal = not different and held.keys() == written.weights.keys()
    with watched("asked SRC", _stored(source.weights), times=len(_IDS)) as stored:
        want = _asked(part, source.kind, stored.weights, source.config)
    config = transformers.AutoConfig.from_pretrained(folder)
    with watched("asked DST", _stored(held), times=len(_IDS)) as stored:
        got = _asked(part, written.kind, stored.weights, config)
    largest = max(float(one.abs().max()) for one in want)
    bound = LAYOUTS["hf"].rounding[rounded] * max(largest, 1.0)
    apart = max(float((one - two).abs().max()) for one, two in zip(want, got, strict=True))
    name = {"llm": "texts", "vision": "pictures"}[part]
    return {
        "num_tensors": len(held),
        "bit_equal": equal,
        "max_abs_logit_diff": {name: apart},
        "bounds": {name: bound},
        "proved": equal and apart <= bound,
        "dtype": rounded or dtype_name(next(iter(held.values())).dtype),
    }


def _asked(part: Part, kind: Any, weights: Mapping[str, Held], config: Any) -> list[Tensor]:
    """Return logits of made-up texts, or the last state of a drawn picture."""
    tied = part == "llm" and config.tie_word_embeddings
    head = {"lm_head.weight": weights["model.embed_tokens.weight"]} if tied else {}
    model = streamed_module(lambda: kind(config), {**weights, **head}, said=part)
    with torch.inference_mode():
        if part == "llm":
            return [model(input_ids=torch.tensor([ids]) % config.vocab_size).logits for ids in _IDS]
        side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        wave = torch.linspace(-2, 2, 3 * side * side).reshape(1, 3, side, side).sin()
        return [model(pixel_values=wave, output_hidden_states=True).hidden_states[-1]]


def _same(one: Held, two: Held | None) -> bool:
    return two is not None and one.dtype == two.dtype and raw(one.read()) == raw(two.read())


def _write_projector(
    folder: Path, weights: list[Weight], to: str, dtype: str, src: Path
) -> Callable[[], dict[str, Any]]:
    if not weights:
        raise ValueError(f"SRC={src} holds no projector")
    named = {sequence_name(weight.name): weight.held for weight in weights}
    held: Mapping[str, Held] = _stored(named).cast(getattr(torch, dtype)).weights if dtype else named
    wide, narrow = held["0.weight"].shape
    depth = sum(name.endswith(".weight") for name in held)
    if to == "xtuner":
        words = {"architectures": ["ProjectorModel"], "model_type": "projector", "depth": depth, "bias": True}
        words |= {"visual_hidden_size": narrow, "llm_hidden_size": wide, "hidden_act": "gelu"}
        durable.write_json(folder / "config.json", words | {"torch_dtype": dtype_name(held["0.weight"].dtype)})
        write_weights(folder, {f"model.{name}": one for name, one in held.items()})
    else:
        words = {"model_type": "llava_llama", "mm_projector_type": f"mlp{depth}x_gelu", "mm_hidden_size": narrow}
        durable.write_json(folder / "config.json", words)
        torch.save(
            {f"model.mm_projector.{name}": one.read() for name, one in held.items()}, folder / "mm_projector.bin"
        )

    def proof() -> dict[str, Any]:
        again = {weight.name: weight.held for weight in LAYOUTS[to].open(folder, field="DST").weights}
        equal = {sequence_name(name) for name in again} == held.keys()
        equal = equal and all(_same(held[sequence_name(name)], one) for name, one in again.items())
        kind = dtype_name(held["0.weight"].dtype)
        said = {"num_tensors": len(again), "bit_equal": equal, "max_abs_logit_diff": {}, "bounds": {}}
        return said | {"proved": equal, "dtype": kind}

    return proof
