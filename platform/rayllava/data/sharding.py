"""Annotations and pictures -> a shard folder: a shuffle of everything in bounded memory, as Ray tasks.

    driver   lists portions and files, looks at the first records of each       before a cluster is used
    spill    files -> buckets by a random key                                   .unfinished/spill-*
    fill     a bucket, sorted: pictures checked -> shards                       .unfinished/shard-*, bucket-*.json
    driver   shards move to OUT; row files, rejected.jsonl; manifest.json last

The same command after a kill finds what is finished by its accounts and does the rest.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np

from rayllava import durable
from rayllava.data.bucket import Filled, Part, fill
from rayllava.data.ingest import Rejected, ShardSpec
from rayllava.data.mixture import Mixture, copies
from rayllava.data.plan import GROUP
from rayllava.data.shards import FORMAT, MANIFEST, ROW_FILES, Shard, ShardManifest
from rayllava.data.sources._published import expected
from rayllava.data.spill import UNFINISHED, Account, Job, spill
from rayllava.place import Place
from rayllava.progress import Progress

log = logging.getLogger(__name__)

REJECTED = "rejected.jsonl"
_MOST_BUCKETS = 512
_MOST_SPILLS = 32
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}

T = TypeVar("T")


def write_shards(
    source: str,
    annotations: Place,
    out: Place,
    *,
    spec: ShardSpec | None = None,
    connect: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> ShardManifest:
    """Write the shards of annotations, one file or a whole mixture, and return their manifest.

    What the first records can tell is found before `connect` is entered; by default the caller is connected to
    Ray already. What an interrupted call with the same inputs finished is kept.
    """
    spec = spec or ShardSpec()
    mixture = Mixture.of(source, annotations, images=spec.images)
    bytes_per_record = mixture.peek(spec.policy)
    origin = _origin(mixture, spec)
    if (out / MANIFEST).is_file():
        return _already(out, origin)
    num_records = mixture.num_bytes / bytes_per_record
    num_buckets = min(_MOST_BUCKETS, max(1, round(num_records / spec.rows)))
    job = Job(out, origin["key"], mixture.portions, mixture.files, spec, num_buckets)
    out.check_writable()
    with connect():
        run = _Run(job)
        accounts = run.spill()
        filled = run.fill(accounts)
    return run.finish(accounts, filled, origin)


def _origin(mixture: Mixture, spec: ShardSpec) -> dict[str, Any]:
    portions = mixture.facts()
    decides = [{key: fact[key] for key in fact if key != "annotations"} for fact in portions]
    key = durable.digest_of([FORMAT, GROUP, spec.rows, spec.seed, decides])
    return {"portions": portions, "rows": spec.rows, "seed": spec.seed, "key": key}


def _already(out: Place, origin: dict[str, Any]) -> ShardManifest:
    manifest = ShardManifest.load(out)
    if manifest.origin["key"] != origin["key"]:
        raise ValueError(f"out={out} already holds shards of something else; give a new folder")
    (out / UNFINISHED).remove()
    log.info("%s is whole already: %d samples", out, manifest.num_samples)
    return manifest


class _Run:
    """The state of one call on the driver."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rejected: list[Rejected] = []

    def spill(self) -> list[Account]:
        """Lay all records into buckets; the buckets of another job are thrown away first."""
        job = self.job
        mark = job.unfinished / "key"
        if not mark.is_file() or mark.read_bytes().decode() != job.key:
            job.unfinished.remove()
            mark.write_bytes(job.key.encode())
        num_tasks = min(_MOST_SPILLS, len(job.files))
        cuts = [list(map(int, part)) for part in np.array_split(np.arange(len(job.files)), num_tasks)]
        drawn = copies(job)
        accounts: dict[int, Account] = {}
        with Progress("files") as progress, self._room():
            progress.add("reading annotations", total=len(job.files))
            calls = ((job, task, cut, {n: drawn[n] for n in cut if n in drawn}) for task, cut in enumerate(cuts))
            for task, account in tasks(spill, calls):
                accounts[task] = account
                self._reject(account.rejected)
                progress.advance("reading annotations", len(cuts[task]))
        made = [accounts[task] for task in sorted(accounts)]
        self._check_budget(made)
        if not sum(account.samples for account in made) + len(self.rejected):
            raise ValueError(f"annotations={job.files[0].place} holds no record")
        return made

    def fill(self, accounts: list[Account]) -> list[Filled]:
        """Write the shards of every bucket."""
        job, filled = self.job, dict[int, Filled]()
        with Progress("samples") as progress, self._room():
            progress.add("sharding", total=sum(account.samples for account in accounts))
            calls = ((job, bucket, len(accounts)) for bucket in range(job.num_buckets))
            for bucket, done in tasks(fill, calls):
                filled[bucket] = done
                self._reject(done.rejected)
                self._check_budget(accounts)
                progress.advance("sharding", done.num_rows)
        return [filled[bucket] for bucket in sorted(filled)]

    def finish(self, accounts: list[Account], filled: list[Filled], origin: dict[str, Any]) -> ShardManifest:
        """Make the folder whole."""
        job = self.job
        parts = [part for one in filled for part in one.parts]
        self._write_rejected()
        if not parts:
            raise ValueError(f"every record was rejected; the reasons are in {job.out / REJECTED}")
        self._move(parts)
        row_files = {name: self._row_file(name, dtype, parts) for name, dtype in ROW_FILES.items()}
        shards = tuple(Shard(part.file, part.rows, -(-part.rows // GROUP), part.digest) for part in parts)
        num_samples = sum(part.rows for part in parts)
        mended = sum((Counter(account.mended) for account in accounts), Counter[str]())
        read = sum((Counter(account.records) for account in accounts), Counter[str]())
        manifest = ShardManifest(
            dir=job.out,
            shards=shards,
            row_files=row_files,
            rows_per_group=GROUP,
            origin=origin | {"records": dict(sorted(read.items()))},
            counts={
                "records": num_samples + len(self.rejected),
                "samples": num_samples,
                "images": sum(sum(part.row_images) for part in parts),
                "text_only": sum(part.row_images.count(0) for part in parts),
                "rejected": len(self.rejected),
            },
            mended=dict(sorted(mended.items())),
            digest=durable.digest_of([FORMAT, GROUP, [shard.__dict__ for shard in shards], row_files]),
        )
        manifest.save()
        job.unfinished.remove()
        self._tell(manifest)
        return manifest

    def _move(self, parts: list[Part]) -> None:
        stale = {place.name for place in self.job.out.files((".parquet",))} - {part.file for part in parts}
        for name in stale:
            (self.job.out / name).remove()
        for part in parts:
            with contextlib.suppress(FileNotFoundError):  # moved already by a call that was killed right here
                (self.job.unfinished / part.file).move(self.job.out / part.file)

    def _row_file(self, name: str, dtype: Any, parts: list[Part]) -> str:
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate([np.array(getattr(part, name), dtype) for part in parts]))
        (self.job.out / f"{name}.npy").write_bytes(buffer.getvalue())
        return durable.digest_bytes(buffer.getvalue())

    def _tell(self, manifest: ShardManifest) -> None:
        read = manifest.origin["records"]
        for number, portion in enumerate(self.job.portions):
            found = sum(read.get(file.source, 0) for file in self.job.files if file.portion == number)
            promised = portion.num_records or expected(Place(portion.annotations).name)
            if promised and promised != found:
                log.warning("%s has %d records; %d are known to be in it", portion.name, found, promised)
        for what, count in manifest.mended.items():
            log.info("%s in %d records", what, count)
        if self.rejected:
            path, total = self.job.out / REJECTED, manifest.counts["records"]
            log.warning("left out %d of %d records, listed in %s", len(self.rejected), total, path)

    def _reject(self, rejected: list[Rejected]) -> None:
        self.rejected += rejected
        if rejected and self.job.spec.policy == "fail":
            raise ValueError(judge(len(rejected), 0, min(rejected), self.job.spec))

    def _check_budget(self, accounts: list[Account]) -> None:
        total = sum(account.samples + len(account.rejected) for account in accounts)
        if len(self.rejected) > self.job.spec.allowed(total):
            self._write_rejected()
            message = judge(len(self.rejected), total, min(self.rejected), self.job.spec)
            raise ValueError(f"{message}; so far they are in {self.job.out / REJECTED}")

    def _write_rejected(self) -> None:
        lines = [json.dumps(one.as_dict(), ensure_ascii=True) + "\n" for one in sorted(self.rejected)]
        (self.job.out / REJECTED).write_bytes("".join(lines).encode())

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Say it in a person's words when the disk is full."""
        try:
            yield
        except OSError as error:
            code = getattr(error, "cause", error).errno  # Ray wraps what a task raised
            if code not in _NO_ROOM:
                raise
            raise ValueError(
                f"out={self.job.out} cannot be written ({os.strerror(code)}); make room and give the "
                "same command again: what is finished is kept"
            ) from error


def judge(num_rejected: int, total: int, first: Rejected, spec: ShardSpec) -> str:
    """Return what to say of more bad records than the words allow."""
    name = f"record {first.line} of {first.source} (id {first.id!r}): {first.reason}"
    if spec.policy == "fail":
        return f"{name}; mend it, or leave such records out with policy=skip"
    budget = spec.budget if spec.budget is not None else "0.01 by default"
    return (
        f"{num_rejected} of {total} records are rejected already, budget ({budget}) allows {spec.allowed(total)}; "
        f"first {name}; mend them or raise budget"
    )


def tasks(body: Callable[..., T], calls: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, T]]:
    """Yield (number of the call, result) as Ray tasks end, a bounded number of them under way."""
    import ray

    task = ray.remote(num_cpus=1, max_retries=10)(body)
    most = max(4, 2 * int(ray.cluster_resources().get("CPU", 1)))
    waiting = iter(enumerate(calls))
    running: dict[Any, int] = {}
    try:
        while True:
            for number, words in waiting:
                running[task.remote(*words)] = number
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
