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
_TURN_S = 0.02
"""Shortest turn of the loop that hands out tasks and rows. Without a task to wait for it would never rest."""


def bound(context: DataContext, *, steps: int, rows: int) -> None:
    """Let a dataset hold at most so many numbers of steps, and then so many rows, beside those in the making."""
    context.set_config(_MOST, (steps, rows))
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, Ahead])
    context.custom_execution_callback_classes = [Rest]


class Ahead(BackpressurePolicy):
    """A source whose blocks wait for a task is not read; a task is not begun while its rows' takers have enough."""

    def can_add_input(self, op: Any) -> bool:
        _, rows = self._data_context.get_config(_MOST)
        return not self._makes_rows(op) or self._waiting(op) < rows

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        steps, _ = self._data_context.get_config(_MOST)
        return 0 if self._is_source(op) and self._waiting(op) >= steps else None

    def _is_source(self, op: Any) -> bool:
        return any(self._makes_rows(after) for after in op.output_dependencies)

    def _makes_rows(self, op: Any) -> bool:
        return any(not after.output_dependencies for after in op.output_dependencies)

    def _waiting(self, op: Any) -> int:
        """Return the blocks between an operator and the next one's tasks, or the dataset's takers."""
        total = self._topology[op].total_enqueued_output_blocks()
        for after in op.output_dependencies:
            total += after.internal_input_queue_num_blocks()
            if not after.output_dependencies:
                total += self._topology[after].total_enqueued_output_blocks()
        return total


class Rest(ExecutionCallback):
    """A pause between two turns of the loop that had nothing to wait for."""

    def __init__(self) -> None:
        self.last = 0.0

    def on_execution_step(self, executor: Any) -> None:
        left = self.last + _TURN_S - time.monotonic()
        if left > 0:
            time.sleep(left)
        self.last = time.monotonic()
