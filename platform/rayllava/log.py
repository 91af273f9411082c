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


def quiet_workers() -> None:
    """Keep Ray's and DeepSpeed's running commentary out of a local run; for Ray's worker_process_setup_hook."""
    for name in ("ray.train", "ray.data", "ray.serve", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Asks a dashboard, which a local run does not start, and says so every second.
    cleaner = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(cleaner).setLevel(logging.ERROR)
