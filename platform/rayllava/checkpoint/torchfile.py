"""Files of torch.save -> nested values with tensors that are read when asked for. No pickle is run.

    zip       NAME/data.pkl, NAME/data/0, NAME/data/1, ...     torch 1.6 and later
    legacy    five pickles, then every storage with its length  torch 0.2 to 1.5, and later when asked for

A storage's bytes are read for one tensor at a time, so a file may be larger than the memory.
"""

from __future__ import annotations

import errno
import io
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayllava.checkpoint.inert import Inert, Name, load

_MAX_PICKLE = 256 << 20
_MAX_DIMS = 64
_MAX_NUMEL = 1 << 60
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

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
class _Storages:
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
    of: _Storages
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


def read(path: Path) -> Any:
    """Return what torch.save was given: containers, plain values, FileTensors, and Inerts for all else.

    Ordered dictionaries come back as dictionaries. Raises ValueError, in one line that names the file, when it is no
    such file, damaged, or claims what it does not hold.
    """
    try:
        with path.open("rb") as file:
            return _read_zip(path, file) if file.read(4) == b"PK\x03\x04" else _read_legacy(path, file)
    except (ValueError, zipfile.BadZipFile, RuntimeError, EOFError, OverflowError, struct.error, zlib.error) as error:
        reason = " ".join(str(error).split())
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the file's beginning
            raise
        reason = "its directory is damaged"
    raise ValueError(f"{path} cannot be read: {reason}; give a whole file of torch.save")


def tensors(path: Path) -> dict[str, FileTensor]:
    """Return the tensors of a file of weights, by name.

    They may lie under `state_dict`, as in checkpoints of mmengine and Lightning. Raises ValueError as `read` does,
    and when the file holds anything else by name.
    """
    return named_tensors(path, read(path))


def named_tensors(path: Path, value: Any) -> dict[str, FileTensor]:
    """Return the tensors in what `read` returned for a file of weights, by name."""
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{path} holds no tensors by name, but a {type(value).__name__}; give a file of weights")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, FileTensor):
            raise ValueError(f"{path} holds {str(name)[:80]!a}, which is no tensor; give a file of weights")
    return value


# -- the two containers --------------------------------------------------------------------------------------


def _read_zip(path: Path, file: io.BufferedReader) -> Any:
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        if len(records) != len(archive.infolist()):
            raise ValueError("it has two records of one name")
        heads = [
            name.removesuffix("data.pkl") for name in records if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(heads) != 1:
            raise ValueError("it is a zip file without torch's data.pkl")
        head = heads[0]
        for info in records.values():
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
                raise ValueError(f"its record {info.filename[:80]!a} is compressed or encrypted")
        if records[f"{head}data.pkl"].file_size > _MAX_PICKLE:
            raise ValueError(f"its pickle is larger than {_MAX_PICKLE >> 20} MiB")
        order = records.get(f"{head}byteorder")
        said = b"little" if order is None else _record(file, order) if order.file_size < 10 else b""
        if said not in (b"little", b"big"):
            raise ValueError("its byte order is neither little nor big")
        storages = _Storages(path, swapped=said == b"big")
        pickled = io.BytesIO(_record(file, records[f"{head}data.pkl"]))
        value = load(pickled, makers=_MAKERS, persistent=_persistent(storages))
        for key, (dtype, numel) in storages.claims.items():
            found = records.get(f"{head}data/{key}")
            if found is None:
                raise ValueError(f"it lacks storage {key[:40]!a}")
            first = _content(file, found)
            if first + found.file_size > size or numel * dtype.itemsize > found.file_size:
                raise ValueError(f"storage {key[:40]!a} is smaller than its pickle says; it has been cut off")
            storages.places[key] = (first, found.file_size, found.CRC)
    return value


def _record(file: io.BufferedReader, info: zipfile.ZipInfo) -> bytes:
    """Return a record's bytes. Not through zipfile, which insists on checksums; torch can be told to write none."""
    file.seek(_content(file, info))
    content = file.read(info.file_size)
    if len(content) != info.file_size or (info.CRC and zlib.crc32(content) != info.CRC):
        raise ValueError(f"its record {info.filename[:80]!a} does not match its checksum")
    return content


def _content(file: io.BufferedReader, info: zipfile.ZipInfo) -> int:
    """Return where a record's bytes begin: behind a header that has lengths of its own."""
    file.seek(info.header_offset)
    signature, name, extra = struct.unpack("<4s22xHH", file.read(30))
    if signature != b"PK\x03\x04":
        raise ValueError("a record does not begin where its directory says")
    return info.header_offset + 30 + name + extra


def _read_legacy(path: Path, file: io.BufferedReader) -> Any:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:  # its reads end where the file does
        pickles: Any = content

        def plain() -> Any:
            return load(pickles, makers={}, persistent=_no_persistent)

        if content[:1] != b"\x80" or plain() != _MAGIC or plain() != _PROTOCOL:
            raise ValueError("it does not begin as one")
        plain()  # sizes of C types; the storages are little-endian on any machine
        storages = _Storages(path)
        value = load(pickles, makers=_MAKERS, persistent=_persistent(storages))
        keys = plain()
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages.claims):
            raise ValueError("its list of storages is not that of its tensors")
        for key in map(str, keys):
            dtype, numel = storages.claims[key]
            (found,) = struct.unpack("<q", content.read(8))
            first = content.tell()
            if found != numel or first + numel * dtype.itemsize > len(content):
                raise ValueError(f"storage {key[:40]!a} is smaller than its pickle says; it has been cut off")
            storages.places[key] = (first, numel * dtype.itemsize, 0)
            content.seek(first + numel * dtype.itemsize)
    return value


def _persistent(storages: _Storages) -> Callable[[Any], Any]:
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


def _no_persistent(_: Any) -> Any:
    raise ValueError("it refers to a storage where none can be")


# -- what torch and numpy would be called for ----------------------------------------------------------------


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

_MAKERS = _REBUILDS | {
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _size,
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _encode,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
