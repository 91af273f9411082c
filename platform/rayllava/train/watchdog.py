"""A step that never ends is named, and ended.

Ranks wait for each other in collectives, so when one hangs all of them stand still, and the one at fault is the one
that is not waiting. Each rank's thread tells the others where it is; what is behind the rest is named.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple, Self

import torch

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_TELL_S = 5.0
"""How long a rank waits for the others to say where they are."""
EXIT = 70
"""Exit code of a worker that was ended for it."""

PHASES = ("data", "count", "backward", "step", "save", "watch", "hold")
"""What a step consists of, in order."""


class Stand(NamedTuple):
    """Where a rank is."""

    step: int
    """1-based."""
    phase: str


class Watchdog:
    """Ends this process once it has been in one phase of a step for `limit_s` seconds, and says who is late."""

    def __init__(self, *, rank: int, world_size: int, limit_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.limit_s = limit_s
        self._stand = Stand(0, "data")
        self._since = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def at(self, step: int, phase: str) -> None:
        """Note that the loop enters a phase of a step, 1-based."""
        assert phase in PHASES, phase
        self._stand, self._since = Stand(step, phase), time.monotonic()

    def _watch(self) -> None:
        while not self._stop.wait(min(_LOOK_S, self.limit_s / 4)):
            if time.monotonic() - self._since > self.limit_s and self._stand.phase != "hold":
                log.error("%s", late(self._stands(), limit_s=self.limit_s))
                faulthandler.dump_traceback(2)
                logging.shutdown()
                os._exit(EXIT)  # the thread that hangs cannot be interrupted

    def _stands(self) -> dict[int, Stand | None]:
        """Return where every rank is, None for one that does not say; all tell when they have waited as long."""
        store = torch.distributed.distributed_c10d._get_default_store()
        store.set(f"stand/{self.rank}", json.dumps(self._stand))
        found: dict[int, Stand | None] = {}
        for rank in range(self.world_size):
            try:
                store.wait([f"stand/{rank}"], timedelta(seconds=_TELL_S))
                found[rank] = Stand(*json.loads(store.get(f"stand/{rank}")))
            except (RuntimeError, ValueError):
                found[rank] = None
        return found


def late(stands: Mapping[int, Stand | None], *, limit_s: float) -> str:
    """Return a sentence that names the ranks that the others wait for."""
    told = {rank: stand for rank, stand in stands.items() if stand is not None}
    silent = sorted(stands.keys() - told.keys())
    first = min((_order(stand) for stand in told.values()), default=(0, 0))
    behind = [rank for rank, stand in told.items() if _order(stand) == first]
    everybody = len(behind) == len(told)
    said = [f"rank {rank} does not say where it is" for rank in silent]
    if told and not (everybody and silent):
        one = told[behind[0]]
        who = "all ranks are" if everybody and len(told) > 1 else f"rank {', '.join(map(str, behind))} is"
        said.append(f"{who} in step {one.step}, {one.phase}")
    return f"no progress for {limit_s:.0f} s (scale.hang_s): {'; '.join(said)}; the group starts again"


def _order(stand: Stand) -> tuple[int, int]:
    return stand.step, PHASES.index(stand.phase)
