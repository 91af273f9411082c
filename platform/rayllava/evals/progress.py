"""How far an evaluation is: bars on a terminal, a line of log now and then elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.progress import TimeRemainingColumn as EtaColumn
from rich.text import Text

log = logging.getLogger(__name__)

LOG_EVERY_S = 20.0


class Meter:
    """Counts answers per benchmark."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), EtaColumn())
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self._speaks = not console.is_terminal
        self._tasks: dict[str, Task] = {}
        self._started: dict[str, tuple[float, float]] = {}
        self._spoke = time.monotonic()

    def add(self, name: str, *, num: int, num_done: int) -> None:
        """Begin to count a benchmark of `num` questions, `num_done` of which need no asking."""
        task_id = self._bars.add_task(name, total=num, completed=num_done)
        self._tasks[name] = next(task for task in self._bars.tasks if task.id == task_id)

    def advance(self, name: str) -> None:
        task = self._tasks[name]
        now = time.monotonic()
        started, num_before = self._started.setdefault(name, (now, task.completed))
        self._bars.advance(task.id)
        if self._speaks and now - self._spoke > LOG_EVERY_S and now > started:
            self._spoke = now
            rate = (task.completed - num_before) / (now - started)
            left = ((task.total or 0) - task.completed) / rate
            text = "%s: %d of %d answered, %.1f a second, %.0f s to go"
            log.info(text, name, task.completed, task.total, rate, left)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.1f}/s")
