"""The process that imports once and forks for every client: python -m rayllava.forked.server PLACE RAYLET"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import random
import runpy
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from rayllava.forked import IMPORTS, LENGTH, exactly, send_signal

_NICE = 10
_IDLE_S = 300.0
"""A server without children ends after so long."""


def main(place: Path, *, raylet: int) -> None:
    """Serve a raylet's clients, unless somebody does already; returns at the end, and in every child at its own."""
    _tidy(place.parent)
    with _alone(place) as alone:
        child = _Server(place, raylet=raylet).run() if alone else None
    if child:
        child()


def _tidy(folder: Path) -> None:
    """Remove what the servers of raylets that are gone have left: logs, and words that nothing is forked there."""
    for path in folder.iterdir():
        if not Path("/proc", path.name.partition("-")[0]).exists():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[bool]:
    """Yield whether no other server listens there, and keep it so inside the block."""
    own, path = os.getpid(), place.with_suffix(".lock")
    while True:
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            if not (path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino):
                continue  # the one before has just removed it
            try:
                yield True
            finally:
                if os.getpid() == own:  # and not in a child, which leaves the block, too
                    for each in (place, path):
                        each.unlink(missing_ok=True)
            return


class _Child(NamedTuple):
    """What a forked process is to be."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    outputs: list[int]

    def __call__(self) -> None:
        """Become the worker."""
        os.setsid()
        for number, descriptor in enumerate(self.outputs):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(self.env)
        os.chdir(self.cwd)
        random.seed()
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed()
        script, *rest = self.argv
        sys.argv = [script, *rest]
        sys.path[0] = str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")


class _Server:
    """Forks a process for every client."""

    def __init__(self, place: Path, *, raylet: int) -> None:
        self.place = place
        self.raylet = raylet
        self.clients: dict[int, socket.socket] = {}
        """By their child's pid."""
        self.busy = time.monotonic()

    def run(self) -> _Child | None:
        """Serve; returns what to become in every child, and nothing at the end of the server itself."""
        thread = threading.Thread(target=_import_humbly, name="imports")
        thread.start()
        thread.join()
        if why := _unforkable():
            self.place.with_suffix(".never").touch()
            raise SystemExit(why)
        gc.collect()
        gc.freeze()  # so that children do not copy what they only look at
        wakes, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        listener = socket.socket(socket.AF_UNIX)
        beside = self.place.with_suffix(".new")
        beside.unlink(missing_ok=True)
        listener.bind(str(beside))
        listener.listen(64)
        beside.rename(self.place)
        while self._needed():
            watched: list[Any] = [listener, wakes, *self.clients.values()]
            ready, _, _ = select.select(watched, [], [], 2.0)
            with contextlib.suppress(BlockingIOError):
                os.read(wakes, 4096)
            self._reap()
            for one in [one for one in ready if one in self.clients.values()]:
                self._abandoned(one)
            if listener in ready and (child := self._fork(listener)):
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for one in (listener, *self.clients.values()):
                    one.close()
                os.close(wakes)
                os.close(wake)
                return child
        return None

    def _fork(self, listener: socket.socket) -> _Child | None:
        """Fork for the client that has come; return its wish in the child alone."""
        connection, _ = listener.accept()
        try:
            connection.settimeout(10.0)
            head, outputs, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
            wish = json.loads(exactly(connection, LENGTH.unpack(head)[0]))
        except (OSError, EOFError, ValueError, struct.error):
            connection.close()
            return None
        pid = os.fork()
        if not pid:
            connection.close()
            return _Child(wish["argv"], wish["env"], wish["cwd"], outputs)
        for descriptor in outputs:
            os.close(descriptor)
        self.clients[pid] = connection
        with contextlib.suppress(OSError):
            connection.sendall(LENGTH.pack(pid))
        return None

    def _reap(self) -> None:
        """Tell clients how their children ended."""
        while self.clients:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.clients.clear()
                return
            if not pid:
                return
            connection = self.clients.pop(pid)
            with contextlib.suppress(OSError), connection:
                connection.sendall(LENGTH.pack(status))
            self.busy = time.monotonic()

    def _abandoned(self, connection: socket.socket) -> None:
        """End the child of a client that is gone."""
        for pid, one in self.clients.items():
            if one is connection:
                send_signal(pid, signal.SIGKILL)

    def _needed(self) -> bool:
        try:
            os.kill(self.raylet, 0)
        except ProcessLookupError:
            return bool(self.clients)  # which see to it themselves
        return bool(self.clients) or time.monotonic() - self.busy < _IDLE_S


def _unforkable() -> str:
    """Say what an import has done that this process's forks would suffer from, if it has."""
    if _holds_gpu():
        return "an import has opened a GPU, which no fork can use then"
    if _drawn_by_a_fork() == _drawn_by_a_fork():
        return "an import has drawn an id of Ray's, and forks would now draw the same ones"
    return ""


def _holds_gpu() -> bool:
    with contextlib.suppress(FileNotFoundError):
        return any(str(path.readlink()).startswith("/dev/nvidia") for path in Path("/proc/self/fd").iterdir())
    return False


def _drawn_by_a_fork() -> bytes:
    """Return the first id that a fork of this process draws."""
    import ray  # here only: clients are to be light

    reads, writes = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(writes, ray.ActorClassID.from_random().binary())
        finally:
            os._exit(0)
    os.close(writes)
    os.waitpid(pid, 0)
    with os.fdopen(reads, "rb") as told:
        return told.read()


def _import_humbly() -> None:
    """Import at a low priority. On Linux that is this thread's and ends with it; a process could not take it back."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    with _undrawn():
        for name in filter(None, os.environ.get(IMPORTS, "").split(",")):
            import_module(name)


@contextlib.contextmanager
def _undrawn() -> Iterator[None]:
    """Let classes become actors without an id that Ray's native part draws.

    It draws from a pool that is seeded once a process, at the first draw: forks made after that draw the same ids.
    Two ranks would call an actor by tasks of the same name, and it crashes where both run at once.
    """
    actor: Any = import_module("ray.actor")
    native = actor.ActorClassID

    class ActorClassID:
        @staticmethod
        def from_random() -> Any:
            return native(os.urandom(native.size()))

    actor.ActorClassID = ActorClassID
    try:
        yield
    finally:
        actor.ActorClassID = native


if __name__ == "__main__":
    main(Path(sys.argv[1]), raylet=int(sys.argv[2]))
