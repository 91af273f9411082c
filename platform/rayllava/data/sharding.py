"""An annotation file and a folder of pictures -> a shard folder, as Ray tasks.

    driver   read, settle and check every record; shuffle; cut into blocks         before a cluster is used
    task     a block: pictures -> OUT/.unfinished/shard-NNNNN.parquet, then .json  whole or absent
    driver   shards move to OUT; row files, rejected.jsonl; manifest.json last

The same command after a kill finds finished blocks by their digests and does the rest.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from rayllava import durable
from rayllava.data.block import UNFINISHED, Part, write_block
from rayllava.data.ingest import Policy, Rejected, ShardSpec, check, settle
from rayllava.data.plan import GROUP, permutation
from rayllava.data.shards import FORMAT, MANIFEST, ROW_FILES, Shard, ShardManifest
from rayllava.data.sources import SOURCES, Record
from rayllava.progress import Progress

log = logging.getLogger(__name__)

REJECTED = "rejected.jsonl"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def write_shards(
    source: str,
    annotations: Path,
    out_dir: Path,
    *,
    images_dir: Path | None = None,
    rows_per_shard: int = 1024,
    policy: Policy = "fail",
    budget: float | None = None,
    seed: int = 42,
    connect: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> ShardManifest:
    """Write the shards of one annotation file and return their manifest.

    Whatever can be wrong without opening a picture is found before `connect` is entered; by default the
    caller is connected to Ray already. Finished shards of an interrupted call with the same inputs are kept.
    """
    spec = ShardSpec(images=str(images_dir or ""), policy=policy, budget=budget, rows=rows_per_shard, seed=seed)
    read = SOURCES[source].read
    if images_dir and not images_dir.is_dir():
        raise ValueError(f"images={images_dir} is not a folder; give the one that the records' paths start from")
    records = read(annotations)
    first = next(records, None)  # the source looks at the file before we digest it
    origin = _origin(source, annotations, spec)
    if (out_dir / MANIFEST).exists():
        return _already(out_dir, origin)
    if first is None:
        raise ValueError(f"annotations={annotations} holds no record")
    job = _Job(source, annotations, out_dir, spec, origin, [first, *records])
    durable.check_writable(out_dir)
    with connect():
        parts = job.run()
    return job.finish(parts)


def _origin(source: str, annotations: Path, spec: ShardSpec) -> dict[str, Any]:
    facts = {
        "source": source,
        "annotations": str(annotations),
        "annotations_digest": durable.digest(annotations),
        "images": spec.images,
        "rows_per_shard": spec.rows,
        "seed": spec.seed,
    }
    decides = {name: value for name, value in facts.items() if name != "annotations"}
    return facts | {"key": durable.digest_of([FORMAT, GROUP, decides])}


def _already(out_dir: Path, origin: dict[str, Any]) -> ShardManifest:
    manifest = ShardManifest.load(out_dir)
    if manifest.origin["key"] != origin["key"]:
        raise ValueError(f"out={out_dir} already holds shards of something else; give a new folder")
    shutil.rmtree(out_dir / UNFINISHED, ignore_errors=True)
    log.info("%s is whole already: %d samples", out_dir, manifest.num_samples)
    return manifest


class _Job:
    """The state of one call on the driver."""

    def __init__(
        self,
        source: str,
        annotations: Path,
        out_dir: Path,
        spec: ShardSpec,
        origin: dict[str, Any],
        records: list[Record],
    ) -> None:
        self.source, self.annotations, self.out_dir = source, annotations, out_dir
        self.spec, self.origin = spec, origin
        self.num_records = len(records)
        self.rejected: list[Rejected] = []
        self.mended: Counter[str] = Counter()
        kept = []
        for record in records:
            record, mended = settle(record)
            if reason := check(record):
                self._reject([Rejected.of(record, reason, source=source)])
                continue
            if record.images and not spec.images:
                raise ValueError(f"images is not set but {self._name(record)} has a picture; add images=DIR")
            self.mended.update(set(mended))
            kept.append(record)
        shuffled = [kept[index] for index in permutation(len(kept), spec.seed)]
        self.blocks = [shuffled[cut : cut + spec.rows] for cut in range(0, len(shuffled), spec.rows)]

    def run(self) -> list[Part]:
        """Return a part for every block, in order."""
        parts: dict[int, Part] = {}
        try:
            with Progress("records") as progress, contextlib.closing(self._results()) as results:
                progress.add("sharding", total=sum(map(len, self.blocks)))
                for number, part in results:
                    parts[number] = part
                    self._reject(part.rejected)
                    progress.advance("sharding", len(self.blocks[number]))
        except OSError as error:
            code = getattr(error, "cause", error).errno  # Ray wraps what a task raised
            if code not in _NO_ROOM:
                raise
            raise ValueError(
                f"out={self.out_dir} cannot be written ({os.strerror(code)}); make room and give the "
                "same command again: finished shards are kept"
            ) from error
        return [parts[number] for number in sorted(parts)]

    def finish(self, parts: list[Part]) -> ShardManifest:
        """Make the folder whole."""
        parts = [part for part in parts if part.rows]
        self._write_rejected()
        if not parts:
            raise ValueError(f"every record was rejected; the reasons are in {self.out_dir / REJECTED}")
        for stale in {path.name for path in self.out_dir.glob("shard-*.parquet")} - {p.file for p in parts}:
            (self.out_dir / stale).unlink()
        for part in parts:
            with contextlib.suppress(FileNotFoundError):  # moved already by a call that was killed right here
                (self.out_dir / UNFINISHED / part.file).replace(self.out_dir / part.file)
        row_files = {}
        for name, dtype in ROW_FILES.items():
            buffer = io.BytesIO()
            np.save(buffer, np.array([value for part in parts for value in getattr(part, name)], dtype))
            durable.write_bytes(self.out_dir / f"{name}.npy", buffer.getvalue())
            row_files[name] = durable.digest(self.out_dir / f"{name}.npy")
        shards = tuple(Shard(part.file, part.rows, -(-part.rows // GROUP), part.digest) for part in parts)
        row_images = [count for part in parts for count in part.row_images]
        manifest = ShardManifest(
            dir=self.out_dir,
            shards=shards,
            row_files=row_files,
            rows_per_group=GROUP,
            origin=self.origin,
            counts={
                "records": self.num_records,
                "samples": len(row_images),
                "images": sum(row_images),
                "text_only": row_images.count(0),
                "rejected": len(self.rejected),
            },
            mended=dict(sorted(self.mended.items())),
            digest=durable.digest_of([FORMAT, GROUP, [shard.__dict__ for shard in shards], row_files]),
        )
        manifest.save()
        shutil.rmtree(self.out_dir / UNFINISHED)
        for what, count in manifest.mended.items():
            log.info("%s in %d of %d records", what, count, self.num_records)
        if self.rejected:
            path = self.out_dir / REJECTED
            log.warning("left out %d of %d records, listed in %s", len(self.rejected), self.num_records, path)
        return manifest

    def _results(self) -> Generator[tuple[int, Part], None, None]:
        """Yield (block number, part) as the tasks end, a bounded number of them under way."""
        import ray

        task = ray.remote(num_cpus=1, max_retries=10)(write_block)
        most = max(4, 2 * int(ray.cluster_resources().get("CPU", 1)))
        place = str(self.out_dir), self.spec.images, self.source, str(self.origin["key"])
        waiting = iter(enumerate(self.blocks))
        running: dict[Any, int] = {}
        try:
            while True:
                for number, block in waiting:
                    running[task.remote(number, block, *place, self.spec.policy)] = number
                    if len(running) == most:
                        break
                if not running:
                    return
                done, _ = ray.wait(list(running))
                yield running.pop(done[0]), ray.get(done[0])
        finally:
            for ref in running:
                ray.cancel(ref)
            for ref in running:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get(ref, timeout=30)

    def _reject(self, rejected: list[Rejected]) -> None:
        self.rejected += rejected
        allowed = self.spec.allowed(self.num_records)
        if len(self.rejected) <= allowed:
            return
        first = min(self.rejected, key=lambda one: one.line)
        what = f"{self._name(first)}: {first.reason}"
        if self.spec.policy == "fail":
            raise ValueError(f"{what}; mend it, or leave such records out with policy=skip")
        self._write_rejected()
        budget = self.spec.budget if self.spec.budget is not None else "0.01 by default"
        raise ValueError(
            f"{len(self.rejected)} of {self.num_records} records are rejected already, budget ({budget}) "
            f"allows {allowed}; first {what}; all are in {self.out_dir / REJECTED}; mend them or raise budget"
        )

    def _name(self, record: Record | Rejected) -> str:
        return f"record {record.line} of {self.annotations} (id {record.id!r})"

    def _write_rejected(self) -> None:
        in_order = sorted(self.rejected, key=lambda one: one.line)
        lines = [json.dumps(one.as_dict(), ensure_ascii=True) + "\n" for one in in_order]
        durable.write_text(self.out_dir / REJECTED, "".join(lines))
