"""How far a long job is: bars with rate and remaining time on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import TaskID

log = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0


class Progress:
    """Counts things of one unit in one or more named rows.

    with Progress("images") as progress:
        progress.add("train", total=1000)
        progress.at("train", 10)
    """

    def __init__(self, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        console = Console(stderr=True)
        self.unit = unit
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._logs = not console.is_terminal
        self._rows: dict[str, _Row] = {}

    def add(self, name: str, *, total: int, done: int = 0) -> None:
        """Open a row; `done` things need no work and do not count towards the rate."""
        task = self._bars.add_task(name, total=total, completed=done, rate="", note="")
        self._rows[name] = _Row(task, total, done)

    def at(self, name: str, done: int, *, note: str = "", rate: float | None = None) -> None:
        """Say that `done` things of a row are done, and their `rate` a second where it is known better than here."""
        row, now = self._rows[name], time.monotonic()
        row.done = done
        rate = (done - row.before) / max(now - row.started, 1e-3) if rate is None else rate
        pace = _pace(rate, self.unit)
        self._bars.update(row.task, completed=done, rate=pace, note=note)
        ended = done >= row.total
        if self._logs and (ended or now - row.spoke >= _LOG_EVERY_S) and not row.ended:
            row.spoke, row.ended = now, ended
            left = f", {_span((row.total - done) / rate)} left" if rate and not ended else ""
            tail = f", {note}" if note else ""
            log.info("%s: %d of %d, %s%s%s", name, done, row.total, pace, left, tail)

    def advance(self, name: str, count: int = 1) -> None:
        self.at(name, self._rows[name].done + count)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


def _pace(rate: float, unit: str) -> str:
    """Return how many things a second, or how many seconds a thing where that is the larger number."""
    return f"{1 / rate:.1f} s a {unit.removesuffix('s')}" if 0 < rate < 0.5 else f"{rate:.1f} {unit}/s"


def _span(seconds: float) -> str:
    """Return seconds, or hours and minutes where there are many."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


class _Row:
    def __init__(self, task: TaskID, total: int, done: int) -> None:
        self.task, self.total, self.done, self.before = task, total, done, done
        self.started = self.spoke = time.monotonic()
        self.ended = False
