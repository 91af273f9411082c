"""Ray's worker processes as forks of one that has imported everything: one for each node and list of modules.

raylet --starts--> client    python -m rayllava.forked default_worker.py ARGUMENTS: light, and all that raylet knows
                     | arguments, environment, folder, outputs
                   server    started by the first client, imports at a low priority, then forks for whoever asks
                     |
                   child     runs default_worker.py as if it had been started that way

The client ends as the child does, and the child with the client. A server ends with its raylet, or when it has had no
child for a while. Where forking is impossible the client becomes the worker itself: slower, and as good.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import json
import os
import random
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from rayllava import durable

_MODULE = "rayllava.forked"
_IMPORTS = "RAYLLAVA_IMPORTS"
_NICE = 10
_IDLE_S = 300.0
"""A server without children ends after so long."""
_WAIT_S = 180.0
"""A client that waits longer for its server becomes the worker itself."""
_NO_JOB = "ffffffff"
"""Ray's id of none: it reads the job of a process when it is imported, and children of a server serve many."""
_LENGTH = struct.Struct("<I")


def runtime_env(modules: Sequence[str]) -> dict[str, Any]:
    """Return the runtime environment of processes that begin with these modules imported."""
    command = f"{sys.executable} -m {_MODULE}"
    return {"py_executable": command, "env_vars": {_IMPORTS: ",".join(modules)}}


def main(argv: list[str]) -> None:
    """Be a client, or the server that one starts."""
    if argv[:1] == ["--serve"]:
        place = Path(argv[1])
        with _alone(place) as alone:
            child = _Server(place, raylet=int(argv[2])).run() if alone else None
        if child:
            child()
        return
    try:
        place = _place()
        connection = _connect(place)
        request = {"argv": argv, "env": dict(os.environ), "cwd": str(Path.cwd())}
        content = json.dumps(request).encode()
        socket.send_fds(connection, [_LENGTH.pack(len(content))], [0, 1, 2])
        connection.sendall(content)
        (pid,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    except (OSError, EOFError, ValueError) as error:
        print(f"rayllava.forked: {error}; starting a worker of its own", file=sys.stderr)
        os.execv(sys.executable, [sys.executable, *argv])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: _signal(pid, number))
    try:
        (status,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    except (OSError, EOFError):  # the server is gone; its children are not
        _outlive(pid)
        return
    if os.WIFSIGNALED(status):
        with contextlib.suppress(OSError):  # SIGKILL's cannot be changed
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    sys.exit(os.waitstatus_to_exitcode(status))


# -- the client's side ----------------------------------------------------------------------------------------


def _place() -> Path:
    """Return where the server of this client's raylet and modules listens."""
    folder = durable.own_dir() / "forks"
    folder.mkdir(exist_ok=True)
    said = f"{os.environ.get(_IMPORTS, '')}:{os.environ.get('PYTHONPATH', '')}"
    return folder / f"{os.getppid()}-{hashlib.blake2b(said.encode(), digest_size=6).hexdigest()}"


def _connect(place: Path) -> socket.socket:
    """Return a connection to the server, which is started where there is none."""
    if place.with_suffix(".never").exists():
        raise ConnectionError(f"no forks here, see {place}.log")
    until = time.monotonic() + _WAIT_S
    server: subprocess.Popen[bytes] | None = None
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(place))
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
        server = server or _start(place)
        if server.poll():  # it ends with 0 when another one is about to listen
            raise ConnectionError(f"the server ended with {server.returncode}, see {place}.log")
        if time.monotonic() > until:
            raise ConnectionError(f"no server within {_WAIT_S:.0f} s, see {place}.log")
        time.sleep(0.05)


def _start(place: Path) -> subprocess.Popen[bytes]:
    with place.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", _MODULE, "--serve", str(place), str(os.getppid())],
            env=os.environ | {"RAY_JOB_ID": _NO_JOB},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _outlive(pid: int) -> None:
    """Wait for a process that is no child."""
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.5)


def _exactly(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        piece = connection.recv(size - len(content))
        if not piece:
            raise EOFError("the server hung up")
        content += piece
    return content


# -- the server's side ----------------------------------------------------------------------------------------


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
            head, outputs, _, _ = socket.recv_fds(connection, _LENGTH.size, 3)
            wish = json.loads(_exactly(connection, _LENGTH.unpack(head)[0]))
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
            connection.sendall(_LENGTH.pack(pid))
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
                connection.sendall(_LENGTH.pack(status))
            self.busy = time.monotonic()

    def _abandoned(self, connection: socket.socket) -> None:
        """End the child of a client that is gone."""
        for pid, one in self.clients.items():
            if one is connection:
                _signal(pid, signal.SIGKILL)

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
        for name in filter(None, os.environ.get(_IMPORTS, "").split(",")):
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
    main(sys.argv[1:])
