"""How far a long job is: a bar for a person who watches, a line now and then for a log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

EVERY_S = 10.0
"""Seconds between two lines of a log."""


class Progress:
    """Count records on the driver and show rate and remaining time on stderr."""

    def __init__(self, verb: str, *, total: int) -> None:
        self.verb, self.total, self.done = verb, total, 0
        self._started = self._spoke = time.monotonic()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} records/s"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(verb, total=total, rate=0.0)

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        rate = self.done / max(now - self._started, 1e-3)
        self._bar.update(self._task, completed=self.done, rate=rate)
        if self._bar.disable and now - self._spoke >= EVERY_S:
            self._spoke = now
            left_s = (self.total - self.done) / rate
            text = "%s: %d of %d records, %.0f records/s, %.0f s left"
            log.info(text, self.verb, self.done, self.total, rate, left_s)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
