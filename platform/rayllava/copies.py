"""A folder that lies elsewhere, present on this node: copied once, whole or absent.

    TMP/rayllava-UID/SOURCE/VERSION/       a copy; that of a newer version of its source takes its place
    TMP/rayllava-UID/SOURCE/.lock          held while it is made, so that one process of a node makes it
    TMP/rayllava-UID/digests/FOLDER.json   what the files of a folder held when they were read last

TMP is the system's folder for temporary files (TMPDIR).
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rayllava import durable
from rayllava.place import Place
from rayllava.progress import Progress

log = logging.getLogger(__name__)

_READERS = 8
"""Files that are read at a time."""
_PIECE = 8 << 20
_LOOK_S = 1.0
"""Between two looks at a folder that somebody fills."""
_SETTLED_S = 2.0
"""A file that changed so lately may change again without its time of change showing it."""


def copy_of(source: str, version: str, fill: Callable[[Path], None]) -> Path:
    """Return this node's copy of one version of a source; where there is none, `fill` makes it in an empty folder.

    `source` is what the thing is called on every node, `version` names its content. Other versions' copies go.
    """
    shelf = durable.own_dir() / durable.digest_bytes(source.encode())[:16]
    target = shelf / version
    if target.is_dir():
        return target
    with _locked(shelf):
        if not target.is_dir():
            for old in shelf.iterdir():  # other versions, and what a killed process left
                if old.is_dir():
                    shutil.rmtree(old, ignore_errors=True)
            with durable.new_dir(target) as partial:
                fill(partial)
            log.info("%s lies in %s now", Place(source), target)
    return target


def local(folder: Place, *, keep: Callable[[Iterable[str]], Iterable[str]] = list) -> Path:
    """Return the folder itself where it is on a disk, else a copy of what it holds now; FileNotFoundError if nothing.

    `keep` chooses the files that are copied, by their names from the folder. A store is asked for the list of its
    files every time, for their bytes once a node.
    """
    if not folder.remote:
        return folder.local
    stamps = folder.stamps()
    stamps = {name: stamps[name] for name in keep(stamps)}
    if not stamps:
        raise FileNotFoundError(f"{folder} holds no file")
    sizes = {name: size for name, (size, _) in stamps.items()}
    return copy_of(folder.text, durable.digest_of(stamps), lambda target: fetch(folder, sizes, target))


def fetch(folder: Place, sizes: Mapping[str, int], target: Path) -> None:
    """Copy the named files, so many bytes each, into a local folder; OSError where one has another size."""
    with _progress(f"copying {folder}", sizes) as tell, ThreadPoolExecutor(_READERS) as pool:

        def copy(name: str) -> int:
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open() as source, path.open("wb") as file:
                while piece := source.read(_PIECE):
                    file.write(piece)
                    tell(len(piece))
                return file.tell()

        for (name, size), got in zip(sizes.items(), pool.map(copy, sizes), strict=True):
            if got != size:
                raise OSError(f"{folder / name} changed while it was copied: {got} bytes, not {size}")


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the digest of each named file (rayllava.durable.digest), read once a node until it changes.

    That a file changed is seen by its size and times.
    """
    note = durable.own_dir() / "digests" / f"{durable.digest_bytes(str(folder.absolute()).encode())[:16]}.json"
    with _locked(note.parent, note.stem):
        known = json.loads(note.read_text()) if note.is_file() else {}
        seen = {name: _seen(folder / name) for name in names}
        new = {name: said[0] for name, said in seen.items() if known.get(name, [])[:-1] != said}
        if new:
            found = _read(folder, new)
            settled = time.time_ns() - _SETTLED_S * 1e9
            known |= {name: [*seen[name], found[name]] for name in new}
            kept = {name: entry for name, entry in known.items() if name not in new or entry[1] < settled}
            durable.write_json(note, kept)
    return {name: known[name][-1] for name in seen}


@contextmanager
def watched(title: str, folder: Path, *, num_bytes: int) -> Iterator[None]:
    """Say how much of `num_bytes` has come into a folder while the block, which cannot tell, fills it."""
    ended = threading.Event()

    def look() -> None:
        with _progress(title, {"": num_bytes}) as tell:
            done = 0
            while not ended.wait(_LOOK_S):
                now = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                tell(now - done)
                done = now

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _read(folder: Path, sizes: Mapping[str, int]) -> dict[str, str]:
    with _progress(f"checking {folder}", sizes) as tell, ThreadPoolExecutor(_READERS) as pool:

        def digest(name: str) -> str:
            found = durable.digest(folder / name)
            tell(sizes[name])
            return found

        return dict(zip(sizes, pool.map(digest, sizes), strict=True))


def _seen(path: Path) -> list[int]:
    said = path.stat()
    return [said.st_size, said.st_mtime_ns, said.st_ctime_ns, said.st_ino]


@contextmanager
def _progress(title: str, sizes: Mapping[str, int]) -> Iterator[Callable[[int], None]]:
    """Yield a function that any thread tells how many bytes it has done."""
    lock, done = threading.Lock(), 0
    with Progress("MB") as progress:
        progress.add(title, total=max(1, int(sum(sizes.values()) / 1e6)))

        def tell(num_bytes: int) -> None:
            nonlocal done
            with lock:
                done += num_bytes
                progress.at(title, int(done / 1e6))

        yield tell


@contextmanager
def _locked(folder: Path, name: str = "") -> Iterator[None]:
    """Be alone on this node inside the block; the lock goes with the process."""
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
