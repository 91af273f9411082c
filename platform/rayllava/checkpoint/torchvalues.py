"""What a pickle of torch.save names -> tensors that know where in a file they lie, and plain values.

Nothing that a pickle names is called: for what torch and numpy would be called for, a maker here gives the same.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayllava.checkpoint.inert import Inert, Name

_MAX_DIMS = 64
_MAX_NUMEL = 1 << 60

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {str(dtype): dtype for dtype in _STORAGES.values()} | {
    f"torch.{name}": getattr(torch, name)
    for name in (
        *("uint16", "uint32", "uint64", "complex32"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
}


@dataclass
class Storages:
    """Where in a file the bytes of its storages are."""

    path: Path
    swapped: bool = False
    """Whether the file was written on a machine of the other byte order."""
    places: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """By key: first byte, number of bytes, their CRC-32 or 0."""
    claims: dict[str, tuple[torch.dtype, int]] = field(default_factory=dict)
    """By key: type and number of elements, as the pickle says."""

    def read(self, key: str, begin: int, end: int) -> bytearray:
        first, size, crc = self.places[key]
        content = bytearray(end - begin)
        with self.path.open("rb") as file:
            file.seek(first + begin)
            if file.readinto(content) != len(content):
                raise ValueError(f"{self.path} ends in the middle of a tensor; it has been cut off or changed")
        if crc and end - begin == size and zlib.crc32(content) != crc:
            raise ValueError(f"{self.path} is damaged: storage {key} does not match its checksum; fetch it again")
        return content


@dataclass(frozen=True, slots=True)
class _Storage:
    of: Storages
    key: str
    dtype: torch.dtype
    num_bytes: int


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor that lies in a file."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """Return the tensor, contiguous and in memory of its own; ValueError when the file is damaged."""
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=self.dtype)
        size, files = self.dtype.itemsize, self.storage.of
        end = self.offset + _reach(self.shape, self.stride)
        content = files.read(self.storage.key, self.offset * size, end * size)
        if files.swapped:
            width = size // 2 if self.dtype.is_complex else size
            content = bytearray(np.frombuffer(content, f"u{width}").byteswap().data)
        flat = torch.frombuffer(content, dtype=torch.uint8).view(self.dtype)
        return flat.as_strided(self.shape, self.stride).contiguous()


def persistent(storages: Storages) -> Callable[[Any], Any]:
    """Return what makes a storage of a pickle's reference to one; it is claimed in `storages`."""

    def storage(id_: Any) -> Any:
        match id_:
            case ("storage", Name(name=kind), str(key), str(), int(numel), *views) if (
                kind in _STORAGES and 0 <= numel < _MAX_NUMEL and not any(view is not None for view in views)
            ):
                claim = (_STORAGES[kind], numel)
                if storages.claims.setdefault(key, claim) != claim:
                    raise ValueError(f"storage {key[:40]!a} is said to be of two kinds")
                return _Storage(storages, key, claim[0], numel * claim[0].itemsize)
            case ("module", Name() as name, *_):  # the class of a model that was saved whole
                return name
        raise ValueError("it refers to something beside its storages")

    return storage


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a tensor that lies within its storage; ValueError for one that does not."""
    lists = isinstance(size, tuple | list) and isinstance(stride, tuple | list) and len(size) == len(stride)
    if not isinstance(storage, _Storage) or not lists or len(size) > _MAX_DIMS:
        raise ValueError("a tensor lacks its storage or its shape")
    if not all(type(number) is int and 0 <= number < _MAX_NUMEL for number in (offset, *size, *stride)):
        raise ValueError("a tensor has a shape that is none")
    dtype = dtype or storage.dtype
    room, numel = storage.num_bytes // dtype.itemsize, math.prod(size)
    if math.prod(max(number, 1) for number in size) > _MAX_NUMEL or numel > room:
        raise ValueError(f"a tensor of {numel} elements lies in a storage of {room}")
    if numel and offset + _reach(size, stride) > room:
        raise ValueError(f"a tensor reaches beyond its storage of {room} elements")
    return FileTensor(storage, dtype, offset, tuple(size), tuple(stride))


def _reach(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return how many elements of the storage a tensor spans from its first to its last."""
    return 1 + sum((number - 1) * step for number, step in zip(size, stride, strict=True))


def _rebuild_tensor(*args: Any) -> Any:
    return _tensor(*args) if len(args) == 4 else NotImplemented


def _rebuild_tensor_v2(*args: Any) -> Any:
    # (storage, offset, size, stride, requires_grad, hooks, metadata): the last says that bits are to be flipped.
    if not 6 <= len(args) <= 7 or any(args[6:]):
        return NotImplemented
    return _tensor(*args[:4])


def _rebuild_tensor_v3(*args: Any) -> Any:
    if not 7 <= len(args) <= 8 or any(args[7:]) or not isinstance(args[6], Name) or args[6].path not in _DTYPES:
        return NotImplemented
    storage, offset, size, stride = args[:4]
    return _tensor(storage, offset, size, stride, _DTYPES[args[6].path])


def _rebuild_parameter(*args: Any) -> Any:
    return args[0] if args and isinstance(args[0], FileTensor) else NotImplemented


def _rebuild_from_type(*args: Any) -> Any:
    """A tensor with attributes: (how it is rebuilt, its class, arguments, attributes)."""
    match args:
        case (Name() as how, Name(), tuple() as given, _) if how.path in _REBUILDS:
            return _REBUILDS[how.path](*given)
    return NotImplemented


def _ordered_dict(*args: Any) -> Any:
    return {} if not args else NotImplemented


def _size(*args: Any) -> Any:
    return args[0] if len(args) == 1 and isinstance(args[0], tuple) else NotImplemented


def _encode(*args: Any) -> Any:
    """Bytes, as protocol 2 writes them."""
    match args:
        case (str(text), "latin1"):
            return text.encode("latin1")
    return NotImplemented


def _scalar(*args: Any) -> Any:
    """A number of numpy's, as Python's."""
    match args:
        case (Inert(of=Name("numpy", "dtype"), args=(str(kind), *_), state=(_, str(order), *_)), bytes(content)):
            orders = ("<", ">", "|") if kind.endswith("1") else ("<", ">")
            if kind in _NUMBERS and order in orders and len(content) == int(kind[1]):
                return np.frombuffer(content, np.dtype(f"{order}{kind}")).item()
    return NotImplemented


_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")

_REBUILDS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}

MAKERS = _REBUILDS | {
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _encode,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
