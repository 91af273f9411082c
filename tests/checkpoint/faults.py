"""A file layer that fails: kills, power cuts, torn writes, full and broken disks, slow ones. For a child to install.

It stands under `pathlib` and `os`, where the product's own calls go through; the product knows nothing of it.
A power cut takes what no fsync has promised: bytes of files that were not flushed, names in folders that were not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import random
import shutil
import signal
import stat
import threading
import time
from typing import Any


class Faults:
    """Counts the operations of this process and lets one of them go wrong."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.kind = self.draw.choice(["kill", "kill", "power cut", "power cut", "ENOSPC", "EIO", "none"])
        self.at = int(self.draw.expovariate(1 / 150))
        self.slow = self.draw.random() < 0.2
        self.count = 0
        self.lock = threading.RLock()
        self.unflushed: set[str] = set()
        self.renamed: list[tuple[str, str]] = []
        self.made: list[str] = []

    def install(self) -> None:
        self.real_open = io.open
        self.real = {name: getattr(os, name) for name in ("fsync", "replace", "mkdir", "unlink")}
        io.open = self.open  # type: ignore[assignment]
        for name in self.real:
            setattr(os, name, getattr(self, name))

    def open(self, file: Any, mode: str = "r", *words: Any, **more: Any) -> Any:
        if "w" not in mode:
            return self.real_open(file, mode, *words, **more)
        with self.lock:
            self.step()
            self.unflushed.add(str(file))
        return _File(self, self.real_open(file, mode, *words, **more))

    def fsync(self, descriptor: int) -> None:
        with self.lock:
            self.step()
            self.real["fsync"](descriptor)
            path = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                self.renamed = [pair for pair in self.renamed if os.path.dirname(pair[1]) != path]  # noqa: PTH120
                self.made = [made for made in self.made if os.path.dirname(made) != path]  # noqa: PTH120
            else:
                self.unflushed.discard(path)

    def replace(self, source: Any, target: Any, **words: Any) -> None:
        with self.lock:
            self.step()
            source, target = str(source), str(target)
            if not os.path.exists(target):  # noqa: PTH110
                self.renamed.append((source, target))
            if source in self.unflushed:
                self.unflushed.add(target)
            self.unflushed.discard(source)
            self.real["replace"](source, target, **words)

    def mkdir(self, path: Any, *words: Any, **more: Any) -> None:
        with self.lock:
            self.step()
            self.real["mkdir"](path, *words, **more)
            self.made.append(str(path))

    def unlink(self, path: Any, **words: Any) -> None:
        with self.lock:
            self.step()
            self.real["unlink"](path, **words)

    def step(self, file: Any = None, content: Any = b"") -> None:
        """Count an operation, and fail if it is its turn; of a write, a random piece happens first."""
        if self.slow and self.draw.random() < 0.1:
            time.sleep(self.draw.random() / 200)
        self.count += 1
        if self.count != self.at or self.kind == "none":
            return
        if file is not None:
            fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT)  # it ends anywhere
            file.write(content[: self.draw.randint(0, len(content))])
            with contextlib.suppress(OSError):
                file.flush()
        if self.kind in ("ENOSPC", "EIO"):
            number = getattr(errno, self.kind)
            raise OSError(number, os.strerror(number))
        if self.kind == "power cut":
            self.cut()
        os.kill(os.getpid(), signal.SIGKILL)

    def cut(self) -> None:
        for path in sorted(self.unflushed):
            with contextlib.suppress(FileNotFoundError):
                os.truncate(path, self.draw.randint(0, os.stat(path).st_size))  # noqa: PTH116
        for source, target in reversed(self.renamed):
            if self.draw.random() < 0.5:
                with contextlib.suppress(FileNotFoundError):
                    self.real["replace"](target, source)
        for path in reversed(self.made):
            if self.draw.random() < 0.5:
                shutil.rmtree(path, ignore_errors=True)


class _File:
    """A file whose writes may fail."""

    def __init__(self, faults: Faults, file: Any) -> None:
        self.faults, self.file = faults, file

    def write(self, content: Any) -> int:
        with self.faults.lock:
            self.faults.step(self.file, content)
            return self.file.write(content)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)
