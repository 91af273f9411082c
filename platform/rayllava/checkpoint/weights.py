"""Weights in a folder, whoever wrote them: safetensors, or files of torch.save, whose pickle is not run.

    model.safetensors.index.json, model.safetensors, pytorch_model.bin.index.json, pytorch_model.bin

Of these the first that a folder holds is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FILES = ("model.safetensors", "pytorch_model.bin")

_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Words of a safetensors header, and torch's names."""


class Held(Protocol):
    """A tensor in a file: its shape is known, its numbers are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor that is made of others, or of one in memory, when it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    trail: tuple[str, ...] = ()
    """Where its numbers come from, and what was done to them, in the order of it."""

    def read(self) -> Tensor:
        return self.make()


def trail_of(held: Held, *steps: str) -> tuple[str, ...]:
    """Return where a tensor comes from, and `steps` that are done to it after that."""
    return (*getattr(held, "trail", ()), *steps)


@dataclass(frozen=True, slots=True)
class _SafeTensor:
    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def trail(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.key)


def weight_files(folder: Path, *, field: str) -> list[Path]:
    """Return the files of a model's weights; ValueError when the folder has none, or not all of them."""
    for name in _FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _listed(index, field=field)
        if (folder / name).is_file():
            return [folder / name]
    raise ValueError(f"{field}={folder} holds neither {_FILES[0]} nor {_FILES[1]}; give a folder with weights")


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Return what a config file of a folder says, nothing when there is none; ValueError when it is damaged."""
    try:
        words = json.loads((folder / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise ValueError(f"{folder / name} is damaged ({error}); fetch it again") from error
    if not isinstance(words, dict):
        raise ValueError(f"{folder / name} is damaged (a {type(words).__name__}); fetch it again")
    return words


def has_weights(folder: Path) -> bool:
    return any((folder / f"{name}{end}").is_file() for name in _FILES for end in ("", ".index.json"))


def open_weights(path: Path) -> dict[str, Held]:
    """Return the tensors of one file by name; ValueError when it is neither kind of file, or damaged."""
    if not _is_safetensors(path):
        from rayllava.checkpoint.torchfile import tensors

        return dict(tensors(path))
    from safetensors import SafetensorError, safe_open

    found: dict[str, Held] = {}
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            for key in keys:
                held = file.get_slice(key)
                found[key] = _SafeTensor(path, key, tuple(held.get_shape()), _dtype(held.get_dtype()))
            return found
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole file of safetensors ({error}); fetch it again") from error


def _dtype(name: str) -> torch.dtype:
    """Return torch's type for the word of a safetensors header; ValueError for one that we do not read."""
    import torch

    if name not in _TYPES:
        raise ValueError(f"tensors of type {name} are not read here; there are: {', '.join(_TYPES)}")
    return getattr(torch, _TYPES[name])


def word_of(dtype: torch.dtype) -> str:
    """Return the word of a safetensors header for torch's type; ValueError for one that we do not write."""
    for word, known in _TYPES.items():
        if known == dtype_name(dtype):
            return word
    raise ValueError(
        f"tensors of type {dtype_name(dtype)} are not written here; there are: {', '.join(_TYPES.values())}"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return what configs call one of torch's types: float16, ..."""
    return str(dtype).removeprefix("torch.")


def stream(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with its name, one in memory at a time; ValueError for a name that occurs twice."""
    seen: set[str] = set()
    for path in files:
        for name, held in open_weights(path).items():
            if name in seen:
                raise ValueError(f"{path.parent} holds {name} in two files; give a folder as it was published")
            seen.add(name)
            yield name, held.read()


def _listed(index: Path, *, field: str) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / Path(name).name for name in names if Path(name).name == name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{field}={index.parent}: {index.name} is damaged; fetch it again") from error
    for path in files:
        if not path.is_file():
            raise ValueError(f"{field}={index.parent} lacks {path.name}, which {index.name} names; fetch it again")
    if not files or len(files) != len(names):
        raise ValueError(f"{field}={index.parent}: {index.name} names files outside of the folder; fetch it again")
    return files


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"
