"""GGUF files (version 2 and 3, little-endian) -> what they say and hold, and back; one tensor in memory at a time.

    magic  version  numbers of tensors and keys
    key  type  value          ...
    name  shape  type  place  ...          shapes are listed with the fastest dimension first
    the tensors' bytes, each at a multiple of `general.alignment`

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package writes it and knows the blocks of
quantized types; its reader believes every length that a file states, so the header is read here.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayllava.checkpoint.weights import Held

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAGIC = b"GGUF"

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_TENSORS, _MOST_KEYS, _MOST_DIMS = 1 << 20, 1 << 16, 4


@dataclass(frozen=True)
class Kv:
    """A value with its type in the file: a scalar's letter of `struct`, `s` for text, or [letter] for an array."""

    kind: str
    value: Any


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor in a file; reading takes it out of its blocks."""

    path: Path
    name: str
    kind: str
    """Name of its type in ggml: F32, F16, Q8_0, ..."""
    shape: tuple[int, ...]
    """Slowest dimension first, as torch has it."""
    place: int

    @property
    def dtype(self) -> torch.dtype:
        return read_dtype(self.kind)

    @property
    def trail(self) -> tuple[str, ...]:
        return (self.name,) if self.kind in _PLAIN else (self.name, f"out of {self.kind}")

    def read(self) -> Tensor:
        with self.path.open("rb") as file:
            file.seek(self.place)
            content = bytearray(stored_bytes(self.shape, self.kind))
            if file.readinto(content) != len(content):
                raise ValueError(f"{self.path} ends in the middle of {self.name}; fetch it again")
        return decoded(np.frombuffer(content, np.uint8), self.kind, self.shape)


class Said(dict[str, Any]):
    """What a file says, by key."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.path} does not say {key}; give a whole model as llama.cpp writes it")

    def number(self, key: str, *, most: int = 1 << 24) -> int:
        """Return a size; ValueError when it is none."""
        value = self[key]
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{self.path} says {key}={str(value)[:40]}, which is none of 1 to {most}")
        return value


def read_gguf(path: Path) -> tuple[Said, dict[str, GgufTensor]]:
    """Return what a file says, by key, and its tensors, by name.

    Raises ValueError, in one line that names the file, when it is damaged, or of a kind that is not read.
    """
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{path} is no GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _Header(path, content).read()
            except (struct.error, UnicodeDecodeError, OverflowError, KeyError) as error:
                raise ValueError(f"{path} is a damaged GGUF file ({error}); fetch it again") from error


def write_gguf(path: Path, said: Mapping[str, Kv], tensors: Mapping[str, tuple[Held, str]]) -> None:
    """Write a file with the tensors, each in the ggml type named beside it."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    letters = {letter: GGUFValueType(number) for number, letter in _SCALARS.items()} | {"s": GGUFValueType.STRING}
    writer = GGUFWriter(path, arch=said["general.architecture"].value)
    for key, kv in said.items():
        if len(kv.kind) == 1:
            writer.kv_data[0].pop(key, None)
            writer.add_key_value(key, kv.value, letters[kv.kind])
        else:
            writer.add_key_value(key, kv.value, GGUFValueType.ARRAY, sub_type=letters[kv.kind[1]])
    for name, (held, kind) in tensors.items():
        number = GGMLQuantizationType[kind]
        nbytes = stored_bytes(held.shape, kind)
        # The type of ordinary numbers makes it take the shape as it is said.
        writer.add_tensor_info(name, held.shape, np.dtype(np.float32), nbytes, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for held, kind in tensors.values():
        writer.write_tensor_data(encoded(held.read(), kind))
    writer.close()


def encoded(tensor: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """Return a tensor's bytes in a type of ggml's."""
    import torch
    from gguf import GGMLQuantizationType, quants

    tensor = tensor.detach().contiguous()
    if kind in _PLAIN:
        return tensor.to(read_dtype(kind)).flatten().view(torch.uint8).numpy()
    return quants.quantize(tensor.float().numpy(), GGMLQuantizationType[kind]).reshape(-1).view(np.uint8)


def decoded(content: np.ndarray[Any, Any], kind: str, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor that bytes are in a type of ggml's; of quantized ones it is float32."""
    import torch
    from gguf import GGMLQuantizationType, quants

    if kind in _PLAIN:
        return torch.from_numpy(content).view(read_dtype(kind)).reshape(shape)
    width = stored_bytes(shape[-1:], kind)
    rows = quants.dequantize(content.reshape(-1, width), GGMLQuantizationType[kind])
    return torch.from_numpy(np.ascontiguousarray(rows, np.float32)).reshape(shape)


_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""torch's types by ggml's that are not quantized."""


def read_dtype(kind: str) -> torch.dtype:
    """Return torch's type of what is read of a tensor in a type of ggml's."""
    import torch

    return getattr(torch, _PLAIN.get(kind, "float32"))


def fits(shape: tuple[int, ...], kind: str) -> bool:
    """Whether a tensor's rows can be cut into a type's blocks."""
    return shape[-1] % _block(kind)[0] == 0


def stored_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Return how many bytes a tensor takes in a type of ggml's."""
    numel, size = _block(kind)
    return math.prod(shape) // numel * size


def _block(kind: str) -> tuple[int, int]:
    """Return how many numbers a block has, and how many bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


class _Header:
    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.at = path, content, 4

    def read(self) -> tuple[Said, dict[str, GgufTensor]]:
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"{self.path} is GGUF of version {version}; 2 and 3 are read, both little-endian")
        num_tensors, num_keys = self.number("Q"), self.number("Q")
        if num_tensors > _MOST_TENSORS or num_keys > _MOST_KEYS:
            raise struct.error(f"{num_tensors} tensors and {num_keys} keys")
        said = Said(self.path)
        for _ in range(num_keys):
            key = self.text()
            if key in said:
                raise KeyError(f"two values of {key[:80]!a}")
            said[key] = self.value(self.number("I"))
        infos = [self.info() for _ in range(num_tensors)]
        step = said.get("general.alignment", 32)
        if type(step) is not int or step < 1 or step & (step - 1):
            raise struct.error(f"general.alignment={step}")
        begin = -(-self.at // step) * step
        tensors = {}
        for name, shape, kind, place in infos:
            size = stored_bytes(shape, kind)
            if name in tensors:
                raise KeyError(f"two tensors called {name[:80]!a}")
            if begin + place + size > len(self.content) or not fits(shape, kind):
                raise struct.error(f"{name[:80]!a} lies beyond its end")
            tensors[name] = GgufTensor(self.path, name, kind, shape, begin + place)
        return said, tensors

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.content, self.at)
        self.at += struct.calcsize(f"<{letter}")
        return value

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode()

    def bytes(self, size: int) -> bytes:
        self.room(size)
        self.at += size
        return self.content[self.at - size : self.at]

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        kind, size = self.number("I"), self.number("Q")
        if kind == _STRING:
            self.room(8 * size)
            return [self.text() for _ in range(size)]
        letter = _SCALARS[kind]
        return list(struct.unpack(f"<{size}{letter}", self.bytes(struct.calcsize(f"<{letter}") * size)))

    def room(self, size: int) -> None:
        if self.at + size > len(self.content):
            raise struct.error(f"{size} bytes where the file has {len(self.content) - self.at}")

    def info(self) -> tuple[str, tuple[int, ...], str, int]:
        from gguf import GGMLQuantizationType

        name, num_dims = self.text(), self.number("I")
        if not 1 <= num_dims <= _MOST_DIMS:
            raise struct.error(f"{name[:80]!a} has {num_dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(num_dims))[::-1]
        number, place = self.number("I"), self.number("Q")
        try:
            kind = GGMLQuantizationType(number).name
        except ValueError as error:
            raise struct.error(f"{name[:80]!a} is of type {number}") from error
        return name, shape, kind, place
