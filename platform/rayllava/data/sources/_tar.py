"""A tar read once from front to end: members in their order, nothing extracted, nothing believed.

tarfile itself ends in silence at a header that it cannot read, keeps a note of every member, and takes an extended
header of any size into memory; so only its parser of the 512 bytes is used.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from rayllava.data.sources._file import head
from rayllava.place import Place

BLOCK = tarfile.BLOCKSIZE
LARGEST = 64 << 20
"""Most bytes of a member; one that is larger is passed over."""

_LONGEST_HEADER = 1 << 20
_AT_ONCE = 1 << 20

_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


@dataclass(frozen=True, slots=True)
class Member:
    """A file of a tar, or what stands there in place of one."""

    name: str
    content: bytes = b""
    fault: str = ""
    """Why its content is not here."""


class BrokenTar(Exception):
    """A tar that began well ends in the middle or goes on as something else."""

    name = ""
    """Of the member whose content broke off; empty where no header could be read."""


def members(annotations: Place) -> Iterator[Member]:
    """Yield the members of a tar, plain or gzipped, but for its folders.

    Raises ValueError for what is no tar at all and BrokenTar for one that breaks off.
    """
    begin = head(annotations, kind="a tar")
    with annotations.open() as file:
        zipped = begin.startswith(b"\x1f\x8b")
        tar = _Tar(cast(BinaryIO, gzip.GzipFile(fileobj=file)) if zipped else file)
        try:
            yield from tar.members()
        except BrokenTar as error:
            if tar.begun:
                raise
            raise ValueError(
                f"annotations={annotations} is no tar, plain or gzipped ({error}); give a tar, or download it again"
            ) from error


class _Tar:
    """The stream and how far it was read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.at, self.begun = file, 0, False

    def members(self) -> Iterator[Member]:
        long: dict[str, str] = {}
        while header := self._header():
            if header.type in _NAMES + _EXTENDED:
                if header.size > _LONGEST_HEADER:
                    raise BrokenTar(f"the header at byte {self.at - BLOCK} claims {header.size} bytes")
                content = self._content(header.size)
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    long["path"] = _text(content.rstrip(b"\0"))
                elif header.type in _EXTENDED and header.type != tarfile.XGLTYPE:
                    long |= _fields(content)
                continue
            name = long.get("path", header.name)
            try:
                member = self._member(header, name, long)
            except BrokenTar as error:
                error.name = name
                raise
            long = {}
            if member:
                yield member

    def _header(self) -> tarfile.TarInfo | None:
        """Return the next header; None where the tar ends as it should."""
        block = self._read(BLOCK)
        if len(block) == BLOCK and not any(block):
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise BrokenTar(
                f"it ends in the middle, at byte {self.at}"
                if len(block) < BLOCK
                else f"{error} before byte {self.at}"
            ) from error
        if header.size < 0:
            raise BrokenTar(f"a member of {header.size} bytes before byte {self.at}")
        self.begun = True
        more = header.type == tarfile.GNUTYPE_SPARSE and block[482]
        while more:  # the map of a sparse file goes on in blocks that its size leaves out
            more = len(block := self._read(BLOCK)) == BLOCK and block[504]
        return header

    def _member(self, header: tarfile.TarInfo, name: str, long: dict[str, str]) -> Member | None:
        size = header.size
        if (told := long.get("size", "")).isascii() and told.isdigit() and len(told) < 20:
            size = int(told)
        if header.type in (tarfile.DIRTYPE, b"V") or (header.type in _FILES and name.endswith("/")):
            self._skip(size)
            return None
        fault = _KINDS.get(header.type, "") or ("" if header.type in _FILES else f"of unknown type {header.type!r}")
        if any(field.startswith("GNU.sparse") for field in long):
            fault = "a sparse file"
        elif not fault and size > LARGEST:
            fault = f"{size >> 20} MiB long; {LARGEST >> 20} is the most"
        if fault:
            # Links, devices and pipes may name the size of what they stand for; no content follows them.
            self._skip(0 if header.type in _KINDS and header.type != tarfile.GNUTYPE_SPARSE else size)
            return Member(name, fault=fault)
        return Member(name, self._content(size))

    def _content(self, size: int) -> bytes:
        content = self._read(size + -size % BLOCK)
        if len(content) < size:
            raise BrokenTar(f"it ends in the middle, at byte {self.at}")
        return content[:size]

    def _skip(self, size: int) -> None:
        left = size + -size % BLOCK
        while left:
            if not (content := self._read(min(left, _AT_ONCE))):
                raise BrokenTar(f"it ends in the middle, at byte {self.at}")
            left -= len(content)

    def _read(self, size: int) -> bytes:
        try:
            content = self.file.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BrokenTar(f"{error} at byte {self.at}".lower()) from error
        self.at += len(content)
        return content


def _fields(content: bytes) -> dict[str, str]:
    """Return the `key=value` records of an extended header, each behind its own length."""
    found = {}
    while content:
        digits, _, _ = content.partition(b" ")
        if not digits.isdigit() or len(digits) > 7 or not len(digits) < int(digits) <= len(content):
            break
        key, _, value = content[len(digits) + 1 : int(digits)].removesuffix(b"\n").partition(b"=")
        found[_text(key)] = _text(value)
        content = content[int(digits) :]
    return found


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
