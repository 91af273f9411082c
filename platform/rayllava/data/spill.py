"""Annotation files -> buckets: the first half of sharding, as Ray tasks.

    file --read--> records --settle, check--> rows with a random key --> the bucket that the key falls into

    OUT/.unfinished/spill-000/bucket-0000.arrow    Arrow streams laid end to end
    OUT/.unfinished/spill-000.json                 the task's account, written last: what a restarted job believes

Sorting a bucket by key finishes a perfect shuffle of everything, and no process ever holds more than a bucket.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayllava.data.ingest import Rejected, ShardSpec, check, settle
from rayllava.data.order import mixed
from rayllava.data.shards import SCHEMA
from rayllava.data.sources import Portion, Record, records
from rayllava.place import Place
from rayllava.records import Turn

UNFINISHED = ".unfinished"
_HELD_BYTES = 64 << 20
"""About so much of its rows a task holds before it appends them to their buckets."""

ROWS = pa.schema(
    [
        ("key", pa.uint64()),
        ("portion", pa.int32()),
        ("source", pa.string()),
        ("number", pa.int64()),
        ("copy", pa.int32()),
        ("line", pa.int64()),
        ("id", pa.string()),
        SCHEMA.field("turns"),
        ("names", pa.list_(pa.string())),
        ("pictures", pa.list_(pa.binary())),
    ]
)

Copies = NDArray[np.uint16]


@dataclass(frozen=True)
class File:
    """One annotation file of a job."""

    portion: int
    place: Place
    source: str
    """What its samples and its rejected records say they come from."""


@dataclass(frozen=True)
class Job:
    """All that decides the shards of a call: plain values, handed to every task."""

    out: Place
    key: str
    """Of the inputs, so that what another job left behind is not taken for ours."""
    portions: tuple[Portion, ...]
    files: tuple[File, ...]
    spec: ShardSpec
    num_buckets: int

    @property
    def unfinished(self) -> Place:
        return self.out / UNFINISHED


@dataclass(frozen=True)
class Account:
    """What a spilling task says of its files."""

    key: str
    records: dict[str, int]
    """Read from each source, bad ones included."""
    samples: int
    """Rows laid into buckets, copies counted."""
    mended: dict[str, int]
    rejected: list[Rejected]

    def save(self, place: Place) -> None:
        place.write_bytes(json.dumps(asdict(self), ensure_ascii=True).encode())

    @classmethod
    def load(cls, place: Place, key: str) -> Account | None:
        """Return the account of an earlier call with the same inputs."""
        if not place.is_file():
            return None
        tree = json.loads(place.read_bytes())
        tree["rejected"] = [Rejected(**one) for one in tree["rejected"]]
        made = cls(**tree)
        return made if made.key == key else None


def spill(job: Job, task: int, numbers: list[int], copies: Mapping[int, Copies]) -> Account:
    """Lay the records of some files into buckets, or find that done; the body of a Ray task.

    `copies` says how often each record of a file counts where the portion's own number does not.
    """
    beside = job.unfinished / f"spill-{task:03d}.json"
    if (account := Account.load(beside, job.key)) is not None:
        return account
    folder = job.unfinished / f"spill-{task:03d}"
    num_read: Counter[str] = Counter()
    mended: Counter[str] = Counter()
    rejected: list[Rejected] = []
    with job.unfinished.scratch() as scratch:
        buckets = _Buckets(scratch, job.num_buckets)
        for at in numbers:
            file = job.files[at]
            for number, record, times in _read(job, file, copies.get(at)):
                num_read[file.source] += 1
                record, done = settle(record)
                mended.update(set(done))
                reason = check(record) or _homeless(record, job.portions[file.portion])
                for copy in range(times):
                    if reason:
                        rejected.append(Rejected(file.source, record.line, copy, record.id, reason))
                        continue
                    key = mixed(job.spec.seed, at, number, copy)
                    buckets.add(key, _row(record, key, file, number, copy))
                if reason and job.spec.policy == "fail":
                    return Account(job.key, dict(num_read), buckets.num_rows, dict(mended), rejected)
        for path in buckets.close():
            (folder / path.name).take(path, sync=False)
    os.sync()  # one flush for all: the account below must not outlive what it tells of
    account = Account(job.key, dict(num_read), buckets.num_rows, dict(mended), rejected)
    account.save(beside)
    return account


def count(file: File, source: str) -> int:
    """Return the number of records of a file."""
    return sum(1 for _ in records(source, file.place))


def bucket_rows(job: Job, bucket: int, num_tasks: int) -> pa.Table:
    """Return the rows of a bucket in their final, shuffled order."""
    tables = [ROWS.empty_table()]
    for task in range(num_tasks):
        place = job.unfinished / f"spill-{task:03d}" / _name(bucket)
        if place.is_file():
            tables += _streams(place)
    table = pa.concat_tables(tables)
    order = [(name, "ascending") for name in ("key", "portion", "source", "number", "copy")]
    return table.sort_by(order) if table.num_rows else table


def record_of(row: Mapping[str, Any]) -> Record:
    """Return the record that a bucket's row was made of."""
    turns = tuple(Turn(**turn) for turn in row["turns"])
    return Record(row["line"], row["id"], turns, (*row["names"], *row["pictures"]))


def _read(job: Job, file: File, copies: Copies | None) -> Iterator[tuple[int, Record, int]]:
    portion = job.portions[file.portion]
    for number, record in enumerate(records(portion.source, file.place)):
        yield number, record, int(portion.repeat) if copies is None else int(copies[number])


def _homeless(record: Record, portion: Portion) -> str:
    if portion.images or not any(isinstance(image, str) for image in record.images):
        return ""
    return "it has a picture but images is not set; add images=DIR"


def _row(record: Record, key: int, file: File, number: int, copy: int) -> dict[str, Any]:
    return {
        "key": key,
        "portion": file.portion,
        "source": file.source,
        "number": number,
        "copy": copy,
        "line": record.line,
        "id": record.id,
        "turns": [{"role": turn.role, "text": turn.text} for turn in record.turns],
        "names": [image for image in record.images if isinstance(image, str)],
        "pictures": [image for image in record.images if isinstance(image, bytes)],
    }


class _Buckets:
    """Rows on their way into files, a bounded number of bytes of them in memory."""

    def __init__(self, folder: Path, num_buckets: int) -> None:
        self.folder, self.num_buckets, self.num_rows = folder, num_buckets, 0
        self._held: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        self._bytes = 0

    def add(self, key: int, row: dict[str, Any]) -> None:
        self._held[(key * self.num_buckets) >> 64].append(row)
        self.num_rows += 1
        # Python's objects take about a kilobyte and a half beside the text itself.
        self._bytes += 1536 + 2 * sum(len(turn["text"]) for turn in row["turns"]) + sum(map(len, row["pictures"]))
        if self._bytes > _HELD_BYTES:
            self._flush()

    def close(self) -> list[Path]:
        self._flush()
        return sorted(self.folder.iterdir())

    def _flush(self) -> None:
        for bucket, rows in self._held.items():
            batch = pa.RecordBatch.from_pylist(rows, ROWS)
            path = self.folder / _name(bucket)
            with path.open("ab") as file, pa.ipc.new_stream(file, ROWS) as stream:
                stream.write_batch(batch)
        self._held.clear()
        self._bytes = 0


def _name(bucket: int) -> str:
    return f"bucket-{bucket:04d}.arrow"


def _streams(place: Place) -> Iterator[pa.Table]:
    source = pa.BufferReader(place.read_bytes()) if place.remote else pa.memory_map(str(place.local))
    with source:
        size = source.size()
        while source.tell() < size:
            yield pa.ipc.open_stream(source).read_all()
