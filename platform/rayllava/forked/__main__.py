"""The process that raylet starts and knows: it asks its node's server for a fork, and lives and ends with that."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from rayllava import durable
from rayllava.forked import IMPORTS, LENGTH, exactly, send_signal

_WAIT_S = 180.0
"""A client that waits longer for its server becomes the worker itself."""
_NO_JOB = "ffffffff"
"""Ray's id of none: it reads the job of a process when it is imported, and children of a server serve many."""


def main(argv: list[str]) -> None:
    """Be the worker that raylet asked for: ask for a fork, or become it."""
    try:
        place = _place()
        connection = _connect(place)
        request = {"argv": argv, "env": dict(os.environ), "cwd": str(Path.cwd())}
        content = json.dumps(request).encode()
        socket.send_fds(connection, [LENGTH.pack(len(content))], [0, 1, 2])
        connection.sendall(content)
        (pid,) = LENGTH.unpack(exactly(connection, LENGTH.size))
    except (OSError, EOFError, ValueError) as error:
        print(f"rayllava.forked: {error}; starting a worker of its own", file=sys.stderr)
        os.execv(sys.executable, [sys.executable, *argv])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: send_signal(pid, number))
    try:
        (status,) = LENGTH.unpack(exactly(connection, LENGTH.size))
    except (OSError, EOFError):  # the server is gone; its children are not
        _outlive(pid)
        return
    if os.WIFSIGNALED(status):
        with contextlib.suppress(OSError):  # SIGKILL's cannot be changed
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    sys.exit(os.waitstatus_to_exitcode(status))


def _place() -> Path:
    """Return where the server of this client's raylet and modules listens."""
    folder = durable.own_dir() / "forks"
    folder.mkdir(exist_ok=True)
    said = f"{os.environ.get(IMPORTS, '')}:{os.environ.get('PYTHONPATH', '')}"
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
            [sys.executable, "-m", "rayllava.forked.server", str(place), str(os.getppid())],
            env=os.environ | {"RAY_JOB_ID": _NO_JOB},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _outlive(pid: int) -> None:
    """Wait for a process that is no child."""
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.5)


if __name__ == "__main__":
    main(sys.argv[1:])
