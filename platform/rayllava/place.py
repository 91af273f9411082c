"""Where bytes lie: a file or folder on a disk (a path) or in an object store (s3://, gs://), through pyarrow.

place = Place("s3://bucket/shards?endpoint_override=127.0.0.1:9000&scheme=http")
(place / "manifest.json").write_bytes(b"{}")
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self, cast

from rayllava import durable

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

_NAMED_WRONG = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES}
_PIECE = 8 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """A file or folder by its text alone, so that it travels between processes.

    What a URI carries behind its `?` are pyarrow's options of the store and stay with every place below it.
    Credentials come from where the store's own tools look for them.
    """

    text: str

    def __truediv__(self, name: str) -> Self:
        """Return a place below. A name that would change a store's options is a ValueError: names may be foreign."""
        if self.remote and "?" in name:
            raise ValueError(f"{name!r} is no name in a store: it holds a question mark")
        head, mark, options = self.text.partition("?") if self.remote else (self.text, "", "")
        return type(self)(f"{head.rstrip('/') or '/'}/{name}".replace("//", "/", head == "/") + mark + options)

    def __str__(self) -> str:
        """Say where it is, without a store's options and without anybody's key."""
        if not self.remote:
            return self.text
        scheme, _, rest = self.text.partition("?")[0].partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    @property
    def remote(self) -> bool:
        return "://" in self.text

    @property
    def local(self) -> Path:
        """The path of a place on a disk."""
        assert not self.remote, f"{self} is not on a disk"
        return Path(self.text)

    @property
    def name(self) -> str:
        return str(self).rstrip("/").rpartition("/")[2]

    def is_file(self) -> bool:
        if not self.remote:
            return self.local.is_file()
        return self._info().is_file

    def is_dir(self) -> bool:
        if not self.remote:
            return self.local.is_dir()
        from pyarrow.fs import FileType

        return self._info().type == FileType.Directory

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def size(self) -> int:
        """Return the bytes of a file; FileNotFoundError when there is none."""
        if not self.remote:
            return self.local.stat().st_size
        info = self._info()
        if not info.is_file:
            raise FileNotFoundError(errno.ENOENT, "No such file", str(self))
        return info.size

    def files(self, suffixes: tuple[str, ...] = ()) -> list[Self]:
        """Return the files of a folder, those of its folders too, in the order of their names."""
        return [self / name for name in self.stamps() if not suffixes or name.lower().endswith(suffixes)]

    def stamps(self) -> dict[str, tuple[int, int]]:
        """Return size and time of change (ns) of every file that `files` lists, by its path from here."""
        found: dict[str, tuple[int, int]] = {}
        if not self.remote:
            for folder, _, names in os.walk(self.local, onerror=_heard):
                for file in (Path(folder, name) for name in names):
                    with suppress(FileNotFoundError):  # gone since it was listed
                        if file.is_file():
                            said = file.stat()
                            found[str(file.relative_to(self.local))] = (said.st_size, said.st_mtime_ns)
        else:
            from pyarrow.fs import FileSelector

            system, path = _system(self.text)
            infos = system.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
            start = len(path.rstrip("/")) + 1
            found = {info.path[start:]: (info.size, info.mtime_ns or 0) for info in infos if info.is_file}
        return {name: found[name] for name in sorted(found) if not re.search(r"(^|/)\.", name)}

    def open(self) -> BufferedReader:
        """Open a file for reading at any position; in a store it is pyarrow's file, which reads alike."""
        if not self.remote:
            return self.local.open("rb")
        system, path = _system(self.text)
        return cast(BufferedReader, system.open_input_file(path))

    def read_bytes(self) -> bytes:
        if not self.remote:
            return self.local.read_bytes()
        with self.open() as file:
            return file.read()

    def digest(self) -> str:
        """Return the BLAKE2b-256 hex digest of a file."""
        if not self.remote:
            return durable.digest(self.local)
        found = hashlib.blake2b(digest_size=32)
        with self.open() as file:
            while piece := file.read(_PIECE):
                found.update(piece)
        return found.hexdigest()

    def write_bytes(self, content: bytes) -> None:
        """Replace a file by `content`; a reader sees the old file or the new one."""
        if not self.remote:
            durable.write_bytes(self.local, content)
            return
        system, path = _system(self.text)
        with system.open_output_stream(path) as file:  # a store shows an object when its stream is closed
            file.write(content)

    @contextmanager
    def new_file(self) -> Iterator[BinaryIO | durable.NewFile]:
        """Yield a file to write under a new name; a reader sees nothing of it, or all once the block has ended well.

        Where the block fails a store, which cannot break off, may show what was written until it is removed here.
        """
        if not self.remote:
            with durable.new_file(self.local) as file:
                yield file
            return
        system, path = _system(self.text)
        stream = system.open_output_stream(path)
        try:
            yield stream
        except BaseException:
            with suppress(OSError):  # what made the block fail counts more
                stream.close()
                self.remove()
            raise
        stream.close()

    def take(self, path: Path, *, sync: bool = True) -> None:
        """Move a finished local file here; a reader sees nothing or all of it."""
        if not self.remote:
            if sync:
                durable.sync_file(path)
            self.local.parent.mkdir(parents=True, exist_ok=True)
            path.replace(self.local)
            return
        from pyarrow.fs import LocalFileSystem, copy_files

        system, target = _system(self.text)
        copy_files(str(path.absolute()), target, LocalFileSystem(), system, chunk_size=_PIECE)
        path.unlink()

    def take_dir(self, path: Path, *, last: str) -> None:
        """Replace this folder by a finished local one; a reader sees the old one, none, or the whole new one.

        A store knows no folders: there it exists while it holds its file `last`, which goes first and comes last.
        """
        if not self.remote:
            durable.take_dir(path, self.local)
            return
        (self / last).remove()
        new = Place(str(path)).stamps()
        for name in self.stamps().keys() - new.keys():
            (self / name).remove()
        for name in sorted(new, key=lambda name: name == last):
            (self / name).take(path / name)

    def move(self, target: Place) -> None:
        """Move a file to another place on the same disk or in the same store."""
        if not self.remote:
            self.local.replace(target.local)
            return
        system, path = _system(self.text)
        if not self._info().is_file:
            raise FileNotFoundError(errno.ENOENT, "No such file", str(self))
        system.move(path, _system(target.text)[1])

    def make_dir(self) -> None:
        """Make a folder where folders exist; a store has none."""
        if not self.remote:
            self.local.mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        """Remove a file or a folder with all that is in it; what is gone already is no error."""
        if not self.remote:
            if self.local.is_dir():
                shutil.rmtree(self.local, ignore_errors=True)
            else:
                self.local.unlink(missing_ok=True)
            return
        system, path = _system(self.text)
        from pyarrow.fs import FileType

        kind = self._info().type
        with suppress(FileNotFoundError):  # somebody else was quicker
            if kind == FileType.File:
                system.delete_file(path)
            elif kind == FileType.Directory:
                system.delete_dir(path)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield an empty local folder, on the same disk when this folder is on one, that is gone afterwards."""
        if self.remote:
            with tempfile.TemporaryDirectory(prefix="rayllava-") as folder:
                yield Path(folder)
            return
        self.make_dir()
        with tempfile.TemporaryDirectory(prefix=f".{os.getpid()}-", suffix=".partial", dir=self.local) as folder:
            yield Path(folder)

    def check_writable(self) -> None:
        """Raise ValueError with a cure when nothing can be written in this folder."""
        if not self.remote:
            durable.check_writable(self.local)
            return
        probe = self / f".probe.{os.getpid()}"
        try:
            probe.write_bytes(b"x")
            probe.remove()
        except OSError as error:
            raise ValueError(f"out={self} cannot be written ({error}); check the address and your access") from error

    def _info(self) -> FileInfo:
        system, path = _system(self.text)
        return system.get_file_info(path)


def names_nothing(error: OSError) -> bool:
    """Say whether an error tells that a name leads to no readable file, rather than that a disk or store failed."""
    return error.errno in _NAMED_WRONG


def _heard(error: OSError) -> None:
    """Let a folder vanish while it is listed, but never take one that cannot be read for an empty one."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _system(text: str) -> tuple[FileSystem, str]:
    scheme, _, rest = text.partition("://")
    store, _, path = rest.partition("/")
    path, _, options = path.partition("?")
    return _open(scheme, store, options), f"{store.rpartition('@')[2]}/{path}".rstrip("/")


@lru_cache(maxsize=16)
def _open(scheme: str, store: str, options: str) -> FileSystem:
    from pyarrow.fs import FileSystem

    try:
        system, _ = FileSystem.from_uri(f"{scheme}://{store}/{'?' + options if options else ''}")
    except (ValueError, OSError) as error:
        where = f"{scheme}://{store.rpartition('@')[2]}"
        raise ValueError(f"{where} cannot be opened: {error}; known are paths, s3:// and gs://") from error
    return system
