"""How far a stream may run ahead of those who take from it: so many blocks, whatever they weigh.

Ray Data bounds bytes. Rows of small pictures weigh so little that hundreds of steps would be made ahead, on the very
cores that train, and thrown away at the next restart; and the numbers of steps weigh nothing at all.
"""

from __future__ import annotations

import time
from typing import Any

from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.execution_callback import ExecutionCallback

_MOST = "rayllava.ahead"
_REST_S = 0.05
"""Pause of the loop that hands out tasks and rows, when no task runs that it could wait for."""


def bound(context: DataContext, *, steps: int, rows: int) -> None:
    """Let a dataset hold at most so many numbers of steps, and then so many rows, beside those in the making."""
    context.set_config(_MOST, (steps, rows))
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, Ahead])
    context.custom_execution_callback_classes = [Rest]


class Ahead(BackpressurePolicy):
    """A source whose blocks wait for a task is not read; a task is not begun while its rows' takers have enough."""

    def can_add_input(self, op: Any) -> bool:
        _, rows = self._data_context.get_config(_MOST)
        makes_rows = any(map(_is_source, op.input_dependencies))
        return not makes_rows or self._rows(op) < rows

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        steps, _ = self._data_context.get_config(_MOST)
        return 0 if _is_source(op) and self._steps(op) >= steps else None

    def _steps(self, op: Any) -> int:
        """Return how many numbers of a source wait for a task."""
        waiting = sum(after.internal_input_queue_num_blocks() for after in op.output_dependencies)
        return self._topology[op].total_enqueued_output_blocks() + waiting

    def _rows(self, op: Any) -> int:
        """Return how many rows of the tasks wait to be dealt to the ranks, or to be taken by them."""
        waiting = sum(after.internal_input_queue_num_blocks() + self._rows(after) for after in op.output_dependencies)
        return self._topology[op].total_enqueued_output_blocks() + waiting


class Rest(ExecutionCallback):
    """A pause while enough rows are made; the loop would turn without one, since the next number is always there."""

    def on_execution_step(self, executor: Any) -> None:
        makers = [op for op in executor._topology if op.input_dependencies and not _is_source(op)]
        if not any(op.num_active_tasks() for op in makers):
            time.sleep(_REST_S)


def _is_source(op: Any) -> bool:
    return bool(op.input_dependencies) and not any(before.input_dependencies for before in op.input_dependencies)
