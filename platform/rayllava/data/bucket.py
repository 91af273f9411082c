"""A bucket of rows -> its shards: the second half of sharding, the body of a Ray task.

OUT/.unfinished/shard-0000-00.parquet    written beside and moved
OUT/.unfinished/bucket-0000.json         the bucket's account, after them: what a restarted job believes
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from rayllava import durable
from rayllava.data.ingest import Rejected, load
from rayllava.data.shards import write_parquet
from rayllava.data.spill import Job, bucket_rows, record_of
from rayllava.place import Place
from rayllava.records import Sample

_AT_A_TIME = 32


@dataclass(frozen=True)
class Part:
    """One shard, plain values only."""

    file: str
    size: int
    digest: str
    row_images: list[int]
    row_text: list[int]

    @property
    def rows(self) -> int:
        return len(self.row_images)


@dataclass(frozen=True)
class Filled:
    """What a task says about its bucket, also kept beside the shards."""

    key: str
    parts: list[Part]
    rejected: list[Rejected]

    @property
    def num_rows(self) -> int:
        return sum(part.rows for part in self.parts) + len(self.rejected)


def fill(job: Job, bucket: int, num_tasks: int) -> Filled:
    """Write the shards of a bucket, or find them written."""
    beside = job.unfinished / f"bucket-{bucket:04d}.json"
    done = _finished(job, beside)
    if done and not done.rejected:
        return done
    table = bucket_rows(job, bucket, num_tasks)
    if done and not _mended_since(job, table, done.rejected):
        return done
    num_shards = max(1, round(table.num_rows / job.spec.rows))
    rejected: list[Rejected] = []
    parts: list[Part] = []
    for number in range(num_shards):
        cut = [table.num_rows * at // num_shards for at in (number, number + 1)]
        rows = table.slice(cut[0], cut[1] - cut[0])
        part = _write(job, rows, f"shard-{bucket:04d}-{number:02d}.parquet", rejected)
        if rejected and job.spec.policy == "fail":
            return Filled(job.key, [], rejected)
        if part:
            parts.append(part)
    filled = Filled(job.key, parts, rejected)
    beside.write_bytes(json.dumps(asdict(filled), ensure_ascii=True).encode())
    return filled


def _write(job: Job, rows: pa.Table, file: str, rejected: list[Rejected]) -> Part | None:
    """Write one shard of what can be loaded; None when that is nothing."""
    row_images: list[int] = []
    row_text: list[int] = []

    def samples() -> Iterator[tuple[Sample, dict[str, Any]]]:
        for row in _dicts(rows):
            try:
                sample = _load(job, row)
            except ValueError as error:  # the fence around one sample
                rejected.append(Rejected(row["source"], row["line"], row["copy"], row["id"], str(error)))
                if job.spec.policy == "fail":
                    return
                continue
            row_images.append(len(sample.images))
            row_text.append(sum(len(turn.text.encode()) for turn in sample.turns))
            yield sample, {name: row[name] for name in ("source", "line", "copy")}

    with job.unfinished.scratch() as scratch:
        path = scratch / file
        write_parquet(path, samples())
        if not row_images or (rejected and job.spec.policy == "fail"):
            return None
        part = Part(file, path.stat().st_size, durable.digest(path), row_images, row_text)
        (job.unfinished / file).take(path)
    return part


def _load(job: Job, row: dict[str, Any]) -> Sample:
    images = job.portions[row["portion"]].images
    return load(record_of(row), Place(images) if images else None)


def _dicts(rows: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield the rows, a few of them in memory at a time."""
    for start in range(0, rows.num_rows, _AT_A_TIME):
        yield from rows.slice(start, _AT_A_TIME).to_pylist()


def _finished(job: Job, beside: Place) -> Filled | None:
    """Return what an earlier call left, if it is ours and its shards are what was written."""
    if not beside.is_file():
        return None
    tree = json.loads(beside.read_bytes())
    parts = [Part(**part) for part in tree["parts"]]
    done = Filled(tree["key"], parts, [Rejected(**one) for one in tree["rejected"]])
    return done if done.key == job.key and all(_whole(job, part) for part in parts) else None


def _whole(job: Job, part: Part) -> bool:
    for place in (job.unfinished / part.file, job.out / part.file):
        if place.is_file() and place.size() == part.size:
            return place.remote or durable.digest(place.local) == part.digest
    return False


def _mended_since(job: Job, table: pa.Table, rejected: list[Rejected]) -> bool:
    """Return whether a record that an earlier call rejected can be read now."""
    places = {(one.source, one.line, one.id) for one in rejected}
    for row in _dicts(table.drop_columns(["pictures"])):
        if (row["source"], row["line"], row["id"]) in places and row["names"]:
            with contextlib.suppress(ValueError):
                _load(job, row | {"pictures": []})
                return True
    return False
