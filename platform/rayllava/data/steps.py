"""The numbers of a run's steps as a source of Ray Data.

One task hands them out, each as a block of its own, so that a stream of any length starts at once: Ray Data's own
range puts a task for every block into the object store before the first of them runs, a millisecond each.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.data.context import DataContext


class Steps(Datasource):
    """0 to `num` - 1, a block each, in a column `id`."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.num = num

    def estimate_inmemory_data_size(self) -> int:
        return 8 * self.num

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        size = self.estimate_inmemory_data_size()
        metadata = BlockMetadata(num_rows=self.num, size_bytes=size, input_files=None, exec_stats=None)
        return [ReadTask(lambda: blocks(self.num), metadata, schema=_SCHEMA)]


_SCHEMA = pa.schema([("id", pa.int64())])


def blocks(num: int) -> Iterator[pa.Table]:
    for step in range(num):
        yield pa.table({"id": [step]}, schema=_SCHEMA)
