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

    def at(self, name: str, done: int, *, note: str = "") -> None:
        """Say that `done` things of a row are done."""
        row, now = self._rows[name], time.monotonic()
        row.done = done
        rate = (done - row.before) / max(now - row.started, 1e-3)
        self._bars.update(row.task, completed=done, rate=f"{rate:.1f} {self.unit}/s", note=note)
        ended = done >= row.total
        if self._logs and (ended or now - row.spoke >= _LOG_EVERY_S) and not row.ended:
            row.spoke, row.ended = now, ended
            left = f", {(row.total - done) / rate:.0f} s left" if rate and not ended else ""
            tail = f", {note}" if note else ""
            log.info("%s: %d of %d, %.1f %s/s%s%s", name, done, row.total, rate, self.unit, left, tail)

    def advance(self, name: str, count: int = 1) -> None:
        self.at(name, self._rows[name].done + count)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


class _Row:
    def __init__(self, task: TaskID, total: int, done: int) -> None:
        self.task, self.total, self.done, self.before = task, total, done, done
        self.started = self.spoke = time.monotonic()
        self.ended = False
