"""Files and folders that are whole or absent: write beside, flush to disk, rename."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_MANY = 200
"""Files of a folder beyond which one flush of everything is quicker than one for each."""
_PIECE = 16 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)
"""None where the system knows no such files."""
_PAGE = 4096
"""Bytes that addresses and lengths are multiples of where writes go past the page cache."""


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; a reader sees the old file or the new one."""
    with _replacement(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def new_file(path: Path) -> Iterator[NewFile]:
    """Yield a file that becomes `path` when the block ends well and vanishes otherwise; for gigabytes.

    What already stands at `path` is replaced.
    """
    with _replacement(path, buffering=0) as file:
        new = NewFile(file)
        yield new
        new.flush()


@contextmanager
def _replacement(path: Path, *, buffering: int = -1) -> Iterator[BinaryIO]:
    """Yield a file that is flushed to disk and becomes `path` when the block ends well."""
    make_dir(path.parent)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with beside.open("wb", buffering=buffering) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_dir(path.parent)


class NewFile:
    """Writes whole pages past the page cache, where the file system can do that, and what is left through it.

    So a gigabyte costs next to no CPU time, and pushes nothing out of memory that somebody reads again.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Take an empty file without a buffer of its own."""
        self._file = file
        self._pages = mmap.mmap(-1, _PIECE)
        self._filled = 0
        self._past_cache(True)

    def write(self, content: bytes | memoryview) -> int:
        """Write bytes, which the caller may change afterwards."""
        rest = memoryview(content)
        while rest:
            count = min(len(rest), _PIECE - self._filled)
            self._pages[self._filled : self._filled + count] = rest[:count]
            self._filled += count
            rest = rest[count:]
            if self._filled == _PIECE:
                self._put(0, _PIECE)
                self._filled = 0
        return len(content)

    def flush(self) -> None:
        """Write what is left; nothing can be written afterwards."""
        whole = self._filled // _PAGE * _PAGE
        self._put(0, whole)
        self._past_cache(False)
        self._put(whole, self._filled)

    def _put(self, start: int, end: int) -> None:
        with memoryview(self._pages) as pages:
            while start < end:
                try:
                    start += self._file.write(pages[start:end])
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    # The file system promised what it cannot do, or a write ended within a page.
                    self._past_cache(False)
                    start += self._file.write(pages[start:end])

    def _past_cache(self, wanted: bool) -> None:
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | _DIRECT if wanted else flags & ~_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise


@contextmanager
def new_dir(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends well and vanishes otherwise.

    What already stands at `path` is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        take_dir(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def take_dir(beside: Path, path: Path) -> None:
    """Replace the folder `path` by a finished one on the same disk, once all that is in it is flushed."""
    files = [file for file in sorted(beside.rglob("*")) if file.is_file()]
    if len(files) > _MANY:
        os.sync()
    else:
        for file in files:
            sync_file(file)
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    beside.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    sync_dir(path.parent)


def make_dir(path: Path) -> None:
    """Make a folder and those above it that are missing, each so that a power cut does not lose it."""
    if not path.is_dir():
        make_dir(path.parent)
        path.mkdir(exist_ok=True)
        sync_dir(path.parent)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_dir(path: Path) -> None:
    """Flush the folder's entries, so that a rename in it survives a power cut."""
    sync_file(path)


def digest(path: Path) -> str:
    """Return the BLAKE2b-256 hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def digest_bytes(content: bytes) -> str:
    """Return what `digest` returns for a file of these bytes."""
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def digest_of(value: Any) -> str:
    """Return a hex digest of a JSON value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_writable(path: Path) -> None:
    """Raise ValueError with a cure when nothing can be written under `path`."""
    probe = path / f".probe.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"out={path} cannot be written ({error.strerror}); give a folder with room that you own"
        ) from error


def own_dir() -> Path:
    """Return this user's folder for what a node keeps for a while; nobody else can write it.

    Raises ValueError when somebody else made it.
    """
    mine = Path(tempfile.gettempdir()) / f"rayllava-{os.getuid()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    if mine.stat().st_uid != os.getuid() or mine.is_symlink():
        raise ValueError(f"{mine} belongs to somebody else; remove it, or set TMPDIR")
    return mine
