"""What sharding would meet, without writing anything: every record read, every picture decoded, as Ray tasks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from rayllava.data.ingest import Rejected, ShardSpec, check, load, settle
from rayllava.data.mixture import Mixture
from rayllava.data.sharding import judge, tasks
from rayllava.data.sources import Record, records
from rayllava.place import Place
from rayllava.progress import Progress

_RECORDS_AT_ONCE = 1024
_BYTES_AT_ONCE = 32 << 20
_KEPT = 3
"""Examples of each reason that the report names."""


@dataclass
class Survey:
    """What was found, in numbers and a few examples of every fault."""

    records: Counter[str] = field(default_factory=Counter)
    """Of each source, bad ones included."""
    counts: Counter[str] = field(default_factory=Counter)
    """samples, images, text_only, picture_bytes"""
    mended: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    """Rejected records by kind of reason."""
    examples: dict[str, list[Rejected]] = field(default_factory=dict)

    @property
    def num_rejected(self) -> int:
        return self.reasons.total()

    def add(self, other: Survey) -> None:
        for name in ("records", "counts", "mended", "reasons"):
            getattr(self, name).update(getattr(other, name))
        for kind, found in other.examples.items():
            self.examples[kind] = (self.examples.get(kind, []) + found)[:_KEPT]

    def reject(self, one: Rejected) -> None:
        kind = _kind(one.reason)
        self.reasons[kind] += 1
        self.examples[kind] = [*self.examples.get(kind, []), one][:_KEPT]

    def text(self) -> str:
        """Return the report."""
        counts = self.counts
        lines = [f"{source}: {number} records" for source, number in self.records.items()]
        lines.append(
            f"{self.records.total()} records: {counts['samples']} good ({counts['images']} images, "
            f"{counts['picture_bytes'] / 2**30:.2f} GiB, {counts['text_only']} without), {self.num_rejected} bad"
        )
        lines += [f"mended: {what} in {number} records" for what, number in sorted(self.mended.items())]
        for kind, number in self.reasons.most_common():
            lines.append(f"bad: {number} x {kind}")
            lines += [f"    record {o.line} of {o.source} (id {o.id!r}): {o.reason}" for o in self.examples[kind]]
        return "\n".join(lines)

    def judge(self, spec: ShardSpec) -> None:
        """Raise ValueError when sharding with these words would fail."""
        if self.num_rejected > spec.allowed(self.records.total()):
            first = min(one for found in self.examples.values() for one in found)
            raise ValueError(judge(self.num_rejected, self.records.total(), first, spec))


def survey(
    source: str,
    annotations: Place,
    *,
    spec: ShardSpec,
    connect: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Survey:
    """Read and check everything that `write_shards` would read."""
    mixture = Mixture.of(source, annotations, images=spec.images)
    mixture.peek("skip")
    found = Survey()
    with connect(), Progress("files") as progress:
        progress.add("checking", total=len(mixture.files))
        calls = _calls(mixture, lambda: progress.advance("checking"))
        for _, part in tasks(examine, calls):
            found.add(part)
    return found


def examine(records: list[Record], source: str, images: str) -> Survey:
    """Check records and their pictures; the body of a Ray task."""
    found = Survey(records=Counter({source: len(records)}))
    for record in records:
        record, mended = settle(record)
        reason = check(record)
        if not reason:
            try:
                sample = load(record, Place(images) if images else None)
            except ValueError as error:  # the fence around one sample
                reason = str(error)
        if reason:
            found.reject(Rejected(source, record.line, 0, record.id, reason))
            continue
        found.mended.update(set(mended))
        found.counts.update(
            samples=1,
            images=len(sample.images),
            text_only=int(not sample.images),
            picture_bytes=sum(map(len, sample.images)),
        )
    return found


def _calls(mixture: Mixture, next_file: Callable[[], None]) -> Iterator[tuple[list[Record], str, str]]:
    for file in mixture.files:
        portion = mixture.portions[file.portion]
        held: list[Record] = []
        size = 0
        for record in records(portion.source, file.place):
            held.append(record)
            size += sum(len(image) for image in record.images if isinstance(image, bytes))
            if len(held) == _RECORDS_AT_ONCE or size > _BYTES_AT_ONCE:
                yield held, file.source, portion.images
                held, size = [], 0
        yield held, file.source, portion.images
        next_file()


def _kind(reason: str) -> str:
    """Return a reason without what differs from record to record."""
    reason = re.sub(r"^image .+?(?=: | is missing| takes | cannot | lies )", "image", reason)
    return re.sub(r"\d+", "N", reason)
