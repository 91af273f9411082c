"""Files of torch.save -> nested values with tensors that are read when asked for. No pickle is run.

    zip       NAME/data.pkl, NAME/data/0, NAME/data/1, ...     torch 1.6 and later
    legacy    five pickles, then every storage with its length  torch 0.2 to 1.5, and later when asked for

A storage's bytes are read for one tensor at a time, so a file may be larger than the memory.
"""

from __future__ import annotations

import errno
import io
import mmap
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from rayllava.checkpoint.inert import load
from rayllava.checkpoint.torchvalues import MAKERS, FileTensor, Storages, persistent

_MAX_PICKLE = 256 << 20
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


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
        storages = Storages(path, swapped=said == b"big")
        pickled = io.BytesIO(_record(file, records[f"{head}data.pkl"]))
        value = load(pickled, makers=MAKERS, persistent=persistent(storages))
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
        storages = Storages(path)
        value = load(pickles, makers=MAKERS, persistent=persistent(storages))
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


def _no_persistent(_: Any) -> Any:
    raise ValueError("it refers to a storage where none can be")
