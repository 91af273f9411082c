"""Folder layouts of checkpoints, one file each, all in terms of one StoredModel.

    folder --detect--> Layout --read--> StoredModel --write--> folder in another layout

Tensors carry canonical names between any two layouts: the parameter names of transformers'
LlavaForConditionalGeneration in memory (`model.language_model.*`, `lm_head.weight`, ...).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rayllava.checkpoint.manifest import ModelManifest
from rayllava.recipe import ProcessorSpec
from rayllava.shelf import Shelf

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Tensors = Callable[[], "Iterable[tuple[str, Tensor]]"]
"""Streams (canonical name, tensor), every name once, one tensor in memory at a time; may be called again."""


@dataclass(frozen=True)
class StoredModel:
    """A LLaVA at rest, in terms that belong to no layout."""

    config: Any
    """transformers' LlavaConfig; its vocabulary is as large as the tensors say."""
    tensors: Tensors
    tokenizer_dir: Path
    """A folder that transformers reads a tokenizer from."""
    dtype: torch.dtype
    """Of the language model's tensors."""

    @classmethod
    def of(cls, llava: Any, tokenizer_dir: Path) -> StoredModel:
        """Return a model in memory as if it were stored; its weights are float, not quantized."""
        return cls(llava.config, lambda: llava.state_dict().items(), tokenizer_dir, llava.lm_head.weight.dtype)

    def cast(self, dtype: torch.dtype) -> StoredModel:
        """Return the model with its floating point tensors in `dtype`."""
        stream = self.tensors

        def tensors() -> Iterable[tuple[str, Tensor]]:
            return ((n, t.to(dtype) if t.is_floating_point() else t) for n, t in stream())

        return dataclasses.replace(self, tensors=tensors, dtype=dtype)


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


@dataclass(frozen=True)
class Layout:
    """How one project lays a LLaVA out on disk; the plug of this package."""

    detect: Callable[[Path], bool]
    """Whether a folder has this layout, judged by content, never by name."""
    read: Callable[[Path], StoredModel]
    write: Write
    describe: Describe


LAYOUTS = Shelf(__name__, Layout)


def detect(folder: Path, *, field: str = "MODEL") -> str:
    """Return the key of a folder's layout; ValueError when it has none that we read."""
    if not folder.is_dir():
        raise ValueError(f"{field}={folder} is no folder; give one that holds a model")
    for key, layout in LAYOUTS.items():
        if layout.detect(folder):
            return key
    raise ValueError(f"{field}={folder} holds no model in a layout that we read; there are: {', '.join(LAYOUTS)}")
