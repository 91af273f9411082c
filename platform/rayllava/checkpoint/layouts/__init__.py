"""Layouts of checkpoints, one file each.

    folder          --detect--> Layout --read--> StoredModel --carry, fill--> folder in another layout   a whole model
    folder or file  --detect--> Layout --open--> Found                                                   what it holds

Tensors of a StoredModel carry canonical names between any two layouts: the parameter names of transformers'
LlavaForConditionalGeneration in memory (`model.language_model.*`, `lm_head.weight`, ...). Those of a Found are named
part by part, since what they become depends on the language model and tower that they were trained with.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

from rayllava import durable
from rayllava.checkpoint.manifest import ModelManifest, write_model_manifest
from rayllava.checkpoint.weights import Computed, Held, dtype_name, open_weights, trail_of
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
    num_own_rows: int
    """Rows of the vocabulary that the language model came with; those beyond are new tokens and padding."""

    @classmethod
    def of(cls, llava: Any, tokenizer_dir: Path, *, num_own_rows: int) -> StoredModel:
        """Return a model in memory as if it were stored; its weights are float, not quantized."""
        weights = {name: _in_memory(tensor) for name, tensor in llava.state_dict().items()}
        return cls(llava.config, weights, tokenizer_dir, llava.lm_head.weight.dtype, num_own_rows)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (canonical name, tensor), one of them in memory at a time."""
        return ((name, held.read()) for name, held in self.weights.items())

    def cast(self, dtype: torch.dtype) -> StoredModel:
        """Return the model with its floating point tensors in `dtype`."""
        weights = {name: _cast(held, dtype) for name, held in self.weights.items()}
        return dataclasses.replace(self, weights=weights, dtype=dtype)

    def own_rows(self) -> StoredModel:
        """Return the model without the rows of its vocabulary that were added."""
        config = copy.deepcopy(self.config)
        config.text_config.vocab_size = rows = self.num_own_rows
        weights = {name: _cut(held, rows) if name in TABLES else held for name, held in self.weights.items()}
        return dataclasses.replace(self, config=config, weights=weights)

    def watched(self, seen: Callable[[Held], None]) -> StoredModel:
        """Return the model that says which tensors were read, each when it was."""
        return dataclasses.replace(self, weights={name: _told(held, seen) for name, held in self.weights.items()})


def _in_memory(tensor: Tensor) -> Held:
    return Computed(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach())


def _cut(held: Held, rows: int) -> Held:
    if held.shape[0] == rows:
        return held
    trail = trail_of(held, f"first {rows} rows")
    return Computed((rows, *held.shape[1:]), held.dtype, lambda: held.read()[:rows], trail)


def _told(held: Held, seen: Callable[[Held], None]) -> Held:
    def make() -> Tensor:
        tensor = held.read()
        seen(held)
        return tensor

    return Computed(held.shape, held.dtype, make, trail_of(held))


def _cast(held: Held, dtype: torch.dtype) -> Held:
    if not held.dtype.is_floating_point or held.dtype == dtype:
        return held
    return Computed(held.shape, dtype, lambda: held.read().to(dtype), trail_of(held, f"to {dtype_name(dtype)}"))


TABLES = ("model.language_model.embed_tokens.weight", "lm_head.weight")
"""Their rows are the vocabulary, which some layouts pad and others do not."""

ROUNDING = {"": 1e-5, "float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}
"""Types that a layout writes, an empty one for tensors as they are, and how far that may move a logit: a share of the
largest one."""

Part = Literal["llm", "vision", "projector"]

_PARTS: tuple[tuple[str, Part, str], ...] = (
    ("model.language_model.", "llm", "model."),
    ("model.vision_tower.", "vision", ""),
    ("model.multi_modal_projector.", "projector", ""),
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """The two matrices whose product, times `scale`, is added to a weight: up (out, r) times down (r, in)."""

    down: Held
    up: Held
    alpha: float
    rslora: bool = False

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of one part of a LLaVA, as a checkpoint holds it."""

    part: Part
    name: str
    """In the part: `model.layers.0...`, `lm_head.weight`; `encoder...` without `vision_model.`; `linear_1.bias`."""
    held: Held
    said: str
    """Its name in the file, for messages."""
    adapter: Adapter | None = None
    """Of which `held` is the product, to be added to the weight of that name; empty for a weight itself."""


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
    image_size: int | None = None
    """Side of its pictures, where that is not what the tower's own files say."""
    layer: int = -2
    """Hidden state of the tower that the projector takes."""
    select: Literal["default", "full"] = "default"
    """Whether the class token is left out, or taken along."""
    aspect: Literal["pad", "crop"] = "pad"
    """What happens to pictures that are not square."""


class Keep(Protocol):
    """Write a model into an empty folder with its adapters apart, as `found` has them; digests as in Fill.

    Raises ValueError, saying why, before anything is written when the layout cannot hold them so.
    """

    def __call__(
        self, folder: Path, stored: StoredModel, manifest: ModelManifest, found: Found
    ) -> dict[str, str]: ...


class Open(Protocol):
    """Find the weights that a checkpoint holds, none of them read yet; ValueError naming `field` when it has none."""

    def __call__(self, path: Path, *, field: str = "MODEL") -> Found: ...


class Say(Protocol):
    """Return what a checkpoint says of its parts; `scratch` is a folder for what others read in another form."""

    def __call__(self, path: Path, scratch: Path) -> Own: ...


class Carry(Protocol):
    """Return a model as a folder of this layout gives it back, its tensors rounded to `dtype` if that is set.

    Raises ValueError, saying why, when the layout cannot hold it.
    """

    def __call__(self, stored: StoredModel, dtype: str | None) -> StoredModel: ...


class Named(Protocol):
    """Return the tensors that are written, by their names in the files; `dtype` and errors as in Carry."""

    def __call__(self, stored: StoredModel, dtype: str | None) -> dict[str, Held]: ...


class Fill(Protocol):
    """Write a model into an empty folder and return the digest of every file with tensors, by its name there."""

    def __call__(
        self, folder: Path, stored: StoredModel, manifest: ModelManifest, dtype: str | None
    ) -> dict[str, str]: ...


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


def says_nothing(path: Path, scratch: Path) -> Own:
    return Own()


def rounded(stored: StoredModel, dtype: str | None) -> StoredModel:
    """Return a model with its tensors rounded, and otherwise as it is."""
    import torch

    return stored.cast(getattr(torch, dtype)) if dtype else stored


def cannot_describe(folder: Path, stored: StoredModel, *, template: str, aspect: str | None = None) -> NoReturn:
    raise ValueError(f"{folder} cannot be described yet")


@dataclass(frozen=True)
class Layout:
    """How one project lays a LLaVA out on disk; the plug of this package."""

    detect: Callable[[Path], bool]
    """Whether a folder, or a file, has this layout, judged by content, never by name."""
    open: Open
    named: Named
    fill: Fill
    own: Say = says_nothing
    read: Callable[[Path], StoredModel] = cannot_read
    """Only where a folder is a whole model; others are put together of parts, see rayllava.model.compose."""
    keep: Keep | None = None
    """Empty where adapters have no place apart from their weights."""
    carry: Carry = rounded
    describe: Describe = cannot_describe
    rounding: Mapping[str, float] = field(default_factory=lambda: ROUNDING)
    """As ROUNDING, of this layout."""
    tolerance: Mapping[str, float] = field(default_factory=dict)
    """By type, where what is written is known only within that share of a tensor's length."""


LAYOUTS = Shelf(__name__, Layout)


def write(
    key: str, folder: Path, stored: StoredModel, manifest: ModelManifest, *, dtype: str | None = None
) -> ModelManifest:
    """Make `folder`, whole or not at all, in the layout of that key and return its manifest."""
    with durable.new_dir(folder) as beside:
        return fill(key, beside, stored, manifest, dtype=dtype)


def fill(
    key: str,
    folder: Path,
    stored: StoredModel,
    manifest: ModelManifest,
    *,
    dtype: str | None = None,
    found: Found | None = None,
) -> ModelManifest:
    """Write a model into an empty folder in the layout of that key and return its manifest, which lies there too.

    With `found` its adapters stay apart, as they are there.
    """
    layout = LAYOUTS[key]
    if found is None:
        files = layout.fill(folder, stored, manifest, dtype)
    elif layout.keep is None:
        raise ValueError(f"to={key} has no place for adapters apart from their weights; leave --keep-adapters out")
    else:
        files = layout.keep(folder, stored, manifest, found)
    manifest = manifest.but(layout=key, files=files, num_own_rows=stored.num_own_rows, proved=None)
    write_model_manifest(folder, manifest)
    return manifest


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
