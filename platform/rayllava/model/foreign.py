"""A checkpoint of another project as the start of a run: does it fit, is it still the same, lay it over.

path --origin_of--> Origin (layout, digests) --open_origin--> Found --check_fits--> what is wrong, in one line
                                                                   --lay_found--> float model with its weights
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayllava import copies
from rayllava.checkpoint.layouts import LAYOUTS, TABLES, Found, Part, Weight, detect, in_whole
from rayllava.checkpoint.manifest import read_model_manifest
from rayllava.checkpoint.parts import read_llm_config, read_tower_config
from rayllava.checkpoint.remap import REMAPS
from rayllava.checkpoint.run import Origin
from rayllava.families import FAMILIES
from rayllava.model.tuning import part_of
from rayllava.place import Place
from rayllava.recipe import ModelSpec, Recipe


@dataclass(frozen=True, slots=True)
class Outline:
    """The shapes of a model that is not built yet."""

    shapes: Mapping[str, tuple[int, ...]]
    """By the name of the parameter."""
    num_own_rows: int
    """Rows of the head without those of new tokens and padding."""
    tied: bool
    """Whether the head is the embedding table."""


Words = Mapping[Part, dict[str, Any]]
"""What config.json says, by part."""

_CURE = {
    "projector": "give the model.llm and model.vision it was trained with; a projector has two layers here",
    "llm": "give the model.llm it was trained with",
    "vision": "give the model.vision and model.image_size it was trained with",
}


def is_foreign(init_from: str) -> bool:
    """Whether a start is a checkpoint of another project and no run of ours; OSError when it cannot be read."""
    try:
        return b'"kind": "run"' not in (Place(init_from) / "manifest.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return True


def origin_of(init_from: str) -> Origin:
    """Look at a foreign start and digest what is read of it; ValueError when it is none that we know."""
    if Place(init_from).remote:
        raise ValueError(
            f"init_from={Place(init_from)} is no run (no manifest.json), and other checkpoints are read from a disk; "
            "copy it to one that all workers share"
        )
    path = Path(init_from)
    if not path.exists():
        raise ValueError(f"init_from={path} does not exist here; give a run or a checkpoint on a disk that all share")
    layout = detect(path, field="init_from")
    files = LAYOUTS[layout].open(path, field="init_from").files
    base = path if path.is_dir() else path.parent
    names = [str(file.relative_to(base)) for file in files]
    return Origin(path=init_from, layout=layout, files=copies.digests(base, names))


def open_origin(origin: Origin) -> Found:
    """Open a run's start again; ValueError when it is not what the run began with, or is not seen here."""
    path = Path(origin.path)
    if not path.exists():
        raise ValueError(f"init_from={path} is not seen on this node; it must lie where all workers can read it")
    base = path if path.is_dir() else path.parent
    found = copies.digests(base, [name for name in origin.files if (base / name).is_file()])
    for name, digest in origin.files.items():
        if found.get(name) != digest:
            raise ValueError(f"init_from={path}: {name} is gone or changed since the run began; put it back")
    return LAYOUTS[origin.layout].open(path, field="init_from")


def whole_model(recipe: Recipe) -> ModelSpec:
    """Return the parts of a start that is a whole model; ValueError when the recipe has to say them."""
    path = Path(recipe.init_from)
    families = [key for key, family in FAMILIES.items() if family.template == recipe.prompt.template]
    if (path / "manifest.json").is_file():
        families = [read_model_manifest(path, field="init_from").family]
    if detect(path, field="init_from") != "hf" or not families:
        raise ValueError(
            f"init_from={path} does not say what model it belongs to; "
            "add model.llm=DIR model.vision=DIR model.family=NAME"
        )
    config = LAYOUTS["hf"].read(path).config
    return ModelSpec(
        llm=str(path),
        vision=str(path),
        family=families[0],
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select=config.vision_feature_select_strategy,
    )


def check_fits(origin: Origin, model: ModelSpec, outline: Outline) -> None:
    """Raise ValueError, naming tensor, shapes and cure, unless a start fits the model; no tensor is read.

    A part that is there at all must be there whole, unless it is adapters.
    """
    found = LAYOUTS[origin.layout].open(Path(origin.path), field="init_from")
    kinds = None if found.translated else words_of(model)
    whole: set[str] = set()
    for weight in found.weights:
        try:
            named = list(translated(weight, torch.empty(weight.held.shape, device="meta"), kinds))
        except ValueError as error:
            raise ValueError(f"init_from={origin.path}: {error}; {_CURE[weight.part]}") from error
        for name, tensor in named:
            have, want = tuple(tensor.shape), outline.shapes.get(name)
            if want is None or not _fits(name, have, want, outline.num_own_rows):
                held = tuple(weight.held.shape)
                said = f"{weight.said} is {held}" + (f", of which {name} is {have}" if held != have else "")
                ours = f"the model has {want}" if want else "the model has no such tensor"
                raise ValueError(f"init_from={origin.path}: {said}; {ours}; {_CURE[weight.part]}")
            if name in whole:
                raise ValueError(f"init_from={origin.path} holds {name} twice; give a checkpoint of one model")
            if not weight.adapter:
                whole.add(name)
    there = {part_of(name) for name in whole}
    for name, want in outline.shapes.items():
        if part_of(name) in there and name not in whole and not (outline.tied and name == "lm_head.weight"):
            cure = _CURE[part_of(name)]
            raise ValueError(f"init_from={origin.path} lacks {name} {want}, but not the rest of it; {cure}")


def lay_found(llava: Any, origin: Origin, model: ModelSpec) -> None:
    """Make a start's weights the float model's own; ValueError when its files changed."""
    found = open_origin(origin)
    kinds = None if found.translated else words_of(model)
    start = Path(origin.path).absolute()
    there = {part for part in ("llm", "vision") if Path(getattr(model, part)).absolute() == start}  # built from it
    with torch.no_grad():
        for weight in found.weights:
            if weight.part in there:
                continue
            for name, tensor in translated(weight, weight.held.read(), kinds):
                parameter = llava.get_parameter(name)
                rows = min(len(tensor), llava.num_own_rows) if name in TABLES else len(parameter)
                if weight.adapter:
                    parameter[:rows] += tensor[:rows].to(parameter.dtype)
                else:
                    parameter[:rows] = tensor[:rows].to(parameter.dtype)


def words_of(model: ModelSpec) -> Words:
    """Return what config.json says of each part of a model."""
    return {
        "llm": read_llm_config(Path(model.llm), family=model.family),
        "vision": read_tower_config(Path(model.vision)),
    }


def translated(weight: Weight, tensor: Tensor, words: Words | None) -> Iterator[tuple[str, Tensor]]:
    """Yield what a weight, or a tensor of its shape, becomes in transformers' class, under its canonical names.

    `words` are those of the parts' config.json, None for a checkpoint whose names are translated already. Raises
    ValueError for a tensor that cannot be taken apart.
    """
    named: Iterable[tuple[str, Tensor]] = [(weight.name, tensor)]
    config = words.get(weight.part) if words else None
    if config and (remap := REMAPS.get(config["model_type"])):
        try:
            named = list(remap.tensor(weight.name, tensor, config))
        except RuntimeError as error:  # torch cannot take apart what has another width
            raise ValueError(
                f"{weight.said} {tuple(tensor.shape)} cannot be taken apart as {config['model_type']} says"
            ) from error
    for name, each in named:
        yield in_whole(weight.part, name), each


def _fits(name: str, have: tuple[int, ...], want: tuple[int, ...], num_own_rows: int) -> bool:
    if name not in TABLES:
        return have == want
    # Others pad the rows too, or add up to three tokens to them.
    most = max(-(-(num_own_rows + 3) // 64) * 64, want[0])
    return have[1:] == want[1:] and num_own_rows <= have[0] <= most
