"""What the controller of a run and the training loop of a worker tell each other, as two threads of one process.

controller --ask()--> worker 0: save after the step you are in, then wait to be replaced
controller <--look()-- worker 0: where the loop is, and whether it waits

Called through Ray Train's worker actors, whose main thread is free while the loop runs in another.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple


class Progress(NamedTuple):
    """Where a training loop is."""

    step: int
    """Steps done."""
    num_steps: int
    step_seconds: float
    """Mean of the last steps; 0 before the first."""
    held: bool
    """It has saved what was asked for and waits."""


_HOLD_S = 180.0
"""A loop that was told to wait and is not replaced goes on after so long: the resize fell through."""

_asked = threading.Event()
_held = threading.Event()
_progress = Progress(0, 0, 0.0, False)


def ask() -> None:
    """Ask the loop to save after its current step and to wait."""
    _asked.set()


def look() -> Progress:
    return _progress._replace(held=_held.is_set())


def asked() -> bool:
    """Say, inside the loop, whether a save was asked for."""
    return _asked.is_set()


def tell(*, step: int, num_steps: int, step_seconds: float) -> None:
    """Say, inside the loop, where it is."""
    global _progress
    _progress = Progress(step, num_steps, step_seconds, held=False)


def hold() -> None:
    """Wait, inside the loop, for the end of this process; return when nobody came to replace it."""
    _held.set()
    time.sleep(_HOLD_S)
    clear()


def clear() -> None:
    _asked.clear()
    _held.clear()
