"""Layouts of checkpoints, one file each.

    folder          --detect--> Layout --read--> StoredModel --write--> folder in another layout   a whole model
    folder or file  --detect--> Layout --open--> Found                                             what it holds

Tensors of a StoredModel carry canonical names between any two layouts: the parameter names of transformers'
LlavaForConditionalGeneration in memory (`model.language_model.*`, `lm_head.weight`, ...). Those of a Found are named
part by part, since what they become depends on the language model and tower that they were trained with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

from rayllava.checkpoint.manifest import ModelManifest
from rayllava.checkpoint.weights import Computed, Held, open_weights
from rayllava.recipe import ProcessorSpec
from rayllava.shelf import Shelf

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class StoredModel:
    """A LLaVA at rest, in terms that belong to no layout."""

    config: Any
    """transformers' LlavaConfig; its vocabulary is as large as the tensors say."""
    weights: Mapping[str, Held]
    """By canonical name; read, or computed, when they are asked for."""
    tokenizer_dir: Path
    """A folder that transformers reads a tokenizer from."""
    dtype: torch.dtype
    """Of the language model's tensors."""

    @classmethod
    def of(cls, llava: Any, tokenizer_dir: Path) -> StoredModel:
        """Return a model in memory as if it were stored; its weights are float, not quantized."""
        weights = {name: _in_memory(tensor) for name, tensor in llava.state_dict().items()}
        return cls(llava.config, weights, tokenizer_dir, llava.lm_head.weight.dtype)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (canonical name, tensor), one of them in memory at a time."""
        return ((name, held.read()) for name, held in self.weights.items())

    def cast(self, dtype: torch.dtype) -> StoredModel:
        """Return the model with its floating point tensors in `dtype`."""
        weights = {name: _cast(held, dtype) for name, held in self.weights.items()}
        return dataclasses.replace(self, weights=weights, dtype=dtype)


def _in_memory(tensor: Tensor) -> Held:
    return Computed(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _cast(held: Held, dtype: torch.dtype) -> Held:
    if not held.dtype.is_floating_point:
        return held
    return Computed(held.shape, dtype, lambda: held.read().to(dtype))


Part = Literal["llm", "vision", "projector"]


_PARTS: tuple[tuple[str, Part, str], ...] = (
    ("model.language_model.", "llm", "model."),
    ("model.vision_tower.", "vision", ""),
    ("model.multi_modal_projector.", "projector", ""),
)


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of one part of a LLaVA, as a checkpoint holds it."""

    part: Part
    name: str
    """In the part: `model.layers.0...`, `lm_head.weight`; `encoder...` without `vision_model.`; `linear_1.bias`."""
    held: Held
    said: str
    """Its name in the file, for messages."""
    adds: bool = False
    """Whether it is to be added to the weight of that name: the product of an adapter."""


@dataclass(frozen=True)
class Found:
    """What a checkpoint holds of a LLaVA: all of it, its projector, adapters, ..."""

    files: tuple[Path, ...]
    """All that was read and decides about the weights."""
    weights: tuple[Weight, ...]
    translated: bool = False
    """Whether names are those of transformers' classes even for models that came with code of their own, see
    rayllava.checkpoint.remap."""


@dataclass(frozen=True)
class Own:
    """What a checkpoint says of its model's parts, beside their weights."""

    llm: Path | None = None
    """A folder with the tokenizer of a language model that it holds whole."""
    words: dict[str, Any] | None = None
    """What config.json says of that language model, in the terms of its own class."""
    vision: Path | None = None
    """A folder with config.json and preprocessor_config.json of a tower that it holds whole."""
    tower: str = ""
    """What it calls the tower that it was trained with: a folder, or a hub id."""
    layer: int = -2
    """Hidden state of the tower that the projector takes."""
    select: Literal["default", "full"] = "default"
    """Whether the class token is left out, or taken along."""
    aspect: Literal["pad", "crop"] = "pad"
    """What happens to pictures that are not square."""


class Open(Protocol):
    """Find the weights that a checkpoint holds, none of them read yet; ValueError naming `field` when it has none."""

    def __call__(self, path: Path, *, field: str = "MODEL") -> Found: ...


class Write(Protocol):
    """Make `folder`, whole or not at all, and return its manifest with the digests of what was written."""

    def __call__(self, folder: Path, stored: StoredModel, manifest: ModelManifest) -> ModelManifest: ...


class Describe(Protocol):
    """Read the prompt path of a folder without manifest.json off its files.

    The template is what no file says. `aspect` overrides what the files say about pictures.
    """

    def __call__(
        self, folder: Path, stored: StoredModel, *, template: str, aspect: str | None = None
    ) -> ProcessorSpec: ...


def cannot_read(folder: Path) -> NoReturn:
    raise ValueError(
        f"{folder} is no whole model by itself; make one with jobs/convert.py {folder} DST --to hf template=NAME"
    )


def says_nothing(path: Path) -> Own:
    return Own()


def cannot_write(folder: Path, stored: StoredModel, manifest: ModelManifest) -> NoReturn:
    raise ValueError(f"{folder} cannot be written in this layout yet")


def cannot_describe(folder: Path, stored: StoredModel, *, template: str, aspect: str | None = None) -> NoReturn:
    raise ValueError(f"{folder} cannot be described yet")


@dataclass(frozen=True)
class Layout:
    """How one project lays a LLaVA out on disk; the plug of this package."""

    detect: Callable[[Path], bool]
    """Whether a folder, or a file, has this layout, judged by content, never by name."""
    open: Open
    own: Callable[[Path], Own] = says_nothing
    """What a checkpoint says of its parts."""
    read: Callable[[Path], StoredModel] = cannot_read
    """Only where a folder is a whole model; others are put together of parts, see rayllava.model.compose."""
    write: Write = cannot_write
    describe: Describe = cannot_describe


LAYOUTS = Shelf(__name__, Layout)


def writable() -> list[str]:
    """Return the keys of layouts that models are written in."""
    return [key for key, layout in LAYOUTS.items() if layout.write is not cannot_write]


def detect(path: Path, *, field: str = "MODEL") -> str:
    """Return the key of a checkpoint's layout; ValueError when it has none that we read."""
    if not path.exists():
        raise ValueError(f"{field}={path} does not exist; give one that holds a model")
    for key, layout in LAYOUTS.items():
        if layout.detect(path):
            return key
    if path.is_file():
        open_weights(path)  # says what is wrong with a damaged one
    raise ValueError(
        f"{field}={path} is no run, nor a model in a layout that we read; there are: {', '.join(LAYOUTS)}"
    )


def part_of(name: str) -> tuple[Part, str]:
    """Return the part that a canonical name belongs to, and its name there."""
    for prefix, part, inner in _PARTS:
        if name.startswith(prefix):
            return part, inner + name.removeprefix(prefix)
    return "llm", name


def in_whole(part: Part, name: str) -> str:
    """Return the canonical name of a part's tensor: the inverse of `part_of`."""
    for prefix, other, inner in _PARTS:
        if part == other and name.startswith(inner):
            return prefix + name.removeprefix(inner)
    return name
