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
import os
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Any

IMPORTS = "RAYLLAVA_IMPORTS"
"""Names the modules, to client and server."""
LENGTH = struct.Struct("<I")
"""Of what follows, of a process id, of the status it ended with."""


def runtime_env(modules: Sequence[str]) -> dict[str, Any]:
    """Return the runtime environment of processes that begin with these modules imported."""
    return {"py_executable": f"{sys.executable} -m {__name__}", "env_vars": {IMPORTS: ",".join(modules)}}


def exactly(connection: socket.socket, size: int) -> bytes:
    """Receive so many bytes; EOFError when the other side hangs up before."""
    content = b""
    while len(content) < size:
        piece = connection.recv(size - len(content))
        if not piece:
            raise EOFError("the server hung up")
        content += piece
    return content


def send_signal(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
