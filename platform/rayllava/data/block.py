"""One block of records -> one shard: the body of a Ray task.

OUT/.unfinished/shard-00000.parquet        written beside and renamed
OUT/.unfinished/shard-00000.parquet.json   its Part, after it: what a restarted job believes
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rayllava import durable
from rayllava.data.ingest import Policy, Rejected, load
from rayllava.data.shards import write_parquet
from rayllava.data.sources import Record
from rayllava.records import Sample

UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Part:
    """What a task says about its block, also kept beside the shard: plain values only."""

    key: str
    """Of the whole job's inputs, so that parts of another job are not taken for ours."""
    file: str
    rows: int
    digest: str
    row_images: list[int]
    row_text: list[int]
    rejected: list[Rejected]


def write_block(
    number: int, block: list[Record], out: str, images: str, source: str, key: str, policy: Policy
) -> Part:
    """Write one shard, or find it written; the body of a Ray task."""
    work = Path(out) / UNFINISHED
    file = f"shard-{number:05d}.parquet"
    beside = work / f"{file}.json"
    images_dir = Path(images) if images else None
    part = _finished(beside, key)
    if part and not _mended_since(part, block, images_dir):
        return part
    rejected: list[Rejected] = []
    row_images: list[int] = []
    row_text: list[int] = []

    def samples() -> Iterator[Sample]:
        for record in block:
            try:
                sample = load(record, images_dir)
            except ValueError as error:  # the fence around one sample
                rejected.append(Rejected.of(record, str(error), source=source))
                if policy == "fail":
                    return
                continue
            row_images.append(len(sample.images))
            row_text.append(sum(len(turn.text.encode()) for turn in sample.turns))
            yield sample

    work.mkdir(exist_ok=True)
    partial = work / f".{file}.{uuid.uuid4().hex}.partial"
    try:
        write_parquet(partial, samples())
        digest = durable.digest(partial)
        part = Part(key, file, len(row_images), digest, row_images, row_text, rejected)
        if rejected and policy == "fail":
            return part
        durable.sync_file(partial)
        partial.replace(work / file)
    finally:
        partial.unlink(missing_ok=True)
    durable.write_json(beside, part.__dict__ | {"rejected": [one.as_dict() for one in rejected]})
    return part


def _finished(beside: Path, key: str) -> Part | None:
    """Return the part that an earlier call left, if it is ours and its shard is what was written."""
    if not beside.exists():
        return None
    tree = json.loads(beside.read_bytes())
    part = Part(**tree | {"rejected": [Rejected(**one) for one in tree["rejected"]]})
    if part.key != key:
        return None
    for folder in (beside.parent, beside.parent.parent):
        path = folder / part.file
        if path.exists() and durable.digest(path) == part.digest:
            return part
    return None


def _mended_since(part: Part, block: list[Record], images_dir: Path | None) -> bool:
    """Return whether a record that an earlier call rejected can be read now."""
    lines = {one.line for one in part.rejected}
    for record in block:
        if record.line in lines:
            with contextlib.suppress(ValueError):
                load(record, images_dir)
                return True
    return False
