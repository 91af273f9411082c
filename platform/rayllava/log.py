"""How the house speaks: one line an event, lower case, the fact first."""

from __future__ import annotations

import logging
import sys


def start(*, rank: int = 0) -> None:
    """Send the log of this process to stderr; only rank 0 says what is not a warning."""
    level = logging.INFO if rank == 0 else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger("rayllava")
    root.handlers = [handler]
    root.setLevel(level)
    root.propagate = False
