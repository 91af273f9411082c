"""Did every sample count exactly once? What a run's ledger says, against its shards and its plan. Runs without Ray.

checkpoint -> chain of segments     unbroken, each as its successor names it; steps 1..cursor once each
shards' own rows -> keys            each as often as the shards hold it in every finished epoch, what the tail
                                    of an epoch leaves out or repeats counted in; in the last one at most so often
plan -> atoms of every step         the ledger's, sample by sample
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayllava.checkpoint import ledger
from rayllava.checkpoint.ledger import LedgerEntry, LedgerError
from rayllava.checkpoint.run import LENGTHS, RunManifest, newest_attempt, read_run
from rayllava.checkpoint.store import Checkpoint, Store
from rayllava.data.order import Indices
from rayllava.data.plan import Plan, plan_of
from rayllava.data.shards import ShardManifest
from rayllava.place import Place

_READERS = 8
_NAMED = 10
"""Violations of a kind that are named; all are counted."""


@dataclass
class Audit:
    """What was found."""

    verdict: str = ""
    """What holds, when nothing is violated."""
    violations: dict[str, list[str]] = field(default_factory=dict)
    """The first of each kind, by kind."""
    counts: dict[str, int] = field(default_factory=dict)
    """All of each kind."""

    @property
    def passed(self) -> bool:
        return not self.counts

    def add(self, kind: str, what: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.violations.setdefault(kind, [])) < _NAMED:
            self.violations[kind].append(what)

    def text(self) -> str:
        """Return the verdict, or the violations, a line each."""
        if self.passed:
            return self.verdict
        lines = []
        for kind, count in self.counts.items():
            lines.append(f"{kind}: {count}")
            lines += [f"  {what}" for what in self.violations[kind]]
        return "\n".join(lines)


def audit(run: Place) -> Audit:
    """Check a run, finished or not; ValueError when there is nothing to check it against.

    Where the ledger holds, RUN/ledger.jsonl is written anew from it.
    """
    manifest = read_run(run)
    checkpoint = Store(run).latest()
    if checkpoint is None:
        raise ValueError(f"RUN={run} has no whole checkpoint yet, so no step counts; train first")
    shards = ShardManifest.load(manifest.recipe.data.shards)
    if shards.digest != manifest.shards_digest:
        raise ValueError(f"data={shards.dir} changed since RUN={run} began; give it back its shards")
    lengths = run / LENGTHS if manifest.recipe.data.max_tokens is not None else None
    plan = plan_of(shards, manifest.recipe.data, manifest.processor, seed=manifest.recipe.seed, lengths=lengths)
    found = Audit()
    entries = _entries(run, checkpoint, found)
    keys = _row_keys(shards).dictionary_encode()
    counted = _Counted(entries, keys.dictionary, found)
    rows = keys.indices.to_numpy()
    done = checkpoint.manifest.step
    _check_steps(entries, done, manifest, found)
    _check_epochs(counted, plan, rows, done, found)
    _check_plan(counted, plan, rows, found)
    if "broken chain" not in found.counts:
        ledger.derive(run, checkpoint.manifest.ledger)
    if found.passed:
        found.verdict = _verdict(run, entries, plan, done)
    return found


def _entries(run: Place, checkpoint: Checkpoint, found: Audit) -> list[LedgerEntry]:
    """Return the ledger's entries in order of steps, as far back as its chain holds."""
    segments = []
    try:
        for segment in ledger.chain(run, checkpoint.manifest.ledger):
            steps = [entry.step for entry in segment.entries]
            if steps != list(range(segment.first, segment.last + 1)):
                told = f"{segment.link.file} does not hold steps {segment.first} to {segment.last}"
                found.add("broken chain", told)
            segments.append(segment)
    except LedgerError as error:
        found.add("broken chain", str(error))
    return [entry for segment in reversed(segments) for entry in segment.entries]


def _check_steps(entries: list[LedgerEntry], done: int, manifest: RunManifest, found: Audit) -> None:
    """Check that the ledger holds each step up to the checkpoint's once."""
    times = np.bincount(np.array([entry.step for entry in entries], np.int64), minlength=done + 1)
    for step in np.flatnonzero(times[1 : done + 1] == 0) + 1:
        found.add("steps that are not in the ledger", f"step {step}")
    for step in np.flatnonzero(times > 1):
        found.add("steps that are in the ledger more than once", f"step {step}, {times[step]} times")
    for step in np.flatnonzero(times[done + 1 :]) + done + 1:
        found.add("steps after the checkpoint", f"step {step} of {done}")
    if manifest.finished and done != manifest.num_steps:
        found.add("steps that are not in the ledger", f"{done + 1} to {manifest.num_steps} of a finished run")


class _Counted:
    """The ledger's samples as numbers: entry by entry, atom by atom, in the order they were computed."""

    def __init__(self, entries: list[LedgerEntry], names: pa.Array, found: Audit) -> None:
        self.names = names
        self.entries = entries
        keys: list[str] = []
        self.sizes: list[list[int]] = []
        for entry in entries:
            atoms = [entry.atoms[index] for index in sorted(entry.atoms)]
            self.sizes.append([len(atom) for atom in atoms])
            for atom in atoms:
                keys += atom
        self.ends = np.cumsum([sum(sizes) for sizes in self.sizes], dtype=np.int64)
        numbers = pc.index_in(pa.array(keys, pa.string()), value_set=names)
        self.numbers = pc.fill_null(numbers, len(names)).to_numpy()  # strangers are one past the last name
        for place in np.flatnonzero(self.numbers == len(names)):
            entry = entries[int(np.searchsorted(self.ends, place, side="right"))]
            found.add("samples that the shards do not hold", f"{keys[place]} in step {entry.step}")

    def of(self, index: int) -> NDArray[np.integer]:
        """Return the samples of the entry at this index."""
        return self.numbers[self.ends[index] - sum(self.sizes[index]) : self.ends[index]]

    def times(self, epoch: int) -> NDArray[np.integer]:
        """Return how often each sample was counted in an epoch."""
        parts = [self.of(index) for index, entry in enumerate(self.entries) if entry.epoch == epoch]
        numbers = np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)
        return np.bincount(numbers, minlength=len(self.names) + 1)[: len(self.names)]


def _check_epochs(counted: _Counted, plan: Plan, rows: Indices, done: int, found: Audit) -> None:
    """Check how often each sample was counted in each epoch that has begun."""
    for epoch in range(-(-done // plan.steps_per_epoch)):
        finished = done >= (epoch + 1) * plan.steps_per_epoch
        times, due = counted.times(epoch), _due(plan, epoch, rows, len(counted.names))
        for number in np.flatnonzero(times > due):
            told = f"{counted.names[number]} in epoch {epoch}: {times[number]} times, not {due[number]}"
            found.add("samples that were counted too often", told)
        for number in np.flatnonzero(times < due) if finished else ():
            told = f"{counted.names[number]} in epoch {epoch}: {times[number]} times, not {due[number]}"
            found.add("samples that were left out", told)


def _due(plan: Plan, epoch: int, rows: Indices, num_names: int) -> NDArray[np.integer]:
    """Return how often an epoch is to count each sample: as often as the shards hold it, but for the tail's rule."""
    due = np.bincount(rows, minlength=num_names)
    rest = plan.num_samples % plan.global_batch
    if rest and plan.tail == "drop":
        last = plan.order(epoch).rows(plan.num_samples - rest, plan.num_samples)
        due = due - np.bincount(rows[last], minlength=num_names)
    if rest and plan.tail == "repeat":
        first = np.resize(plan.order(epoch).rows(0, plan.num_samples), plan.global_batch - rest)
        due = due + np.bincount(rows[first], minlength=num_names)
    return due


def _check_plan(counted: _Counted, plan: Plan, rows: Indices, found: Audit) -> None:
    """Check that each step holds the planned atoms, sample by sample."""
    for index, entry in enumerate(counted.entries):
        if entry.step > plan.num_steps:
            found.add("steps after the last", f"step {entry.step} of {plan.num_steps}")
            continue
        atoms = plan.atoms(entry.step - 1)
        planned = rows[np.concatenate([atom.samples for atom in atoms])]
        got = counted.of(index)
        sizes = [len(atom.samples) for atom in atoms]
        epoch = plan.epoch_of(entry.step - 1)
        if entry.epoch != epoch:
            found.add("steps that are not as planned", f"step {entry.step}: epoch {entry.epoch}, not {epoch}")
        elif counted.sizes[index] != sizes or not np.array_equal(got, planned):
            told = f"step {entry.step}: {_difference(got, planned, counted.names)}"
            found.add("steps that are not as planned", told)


def _difference(got: NDArray[np.integer], planned: NDArray[np.integer], names: pa.Array) -> str:
    extra, lacking = (
        [str(names[int(number)]) for number in np.setdiff1d(some, others) if number < len(names)]
        for some, others in ((got, planned), (planned, got))
    )
    if extra or lacking:
        return f"holds {_some(extra) or 'nothing'} beyond the plan, lacks {_some(lacking) or 'nothing'}"
    return f"{len(got)} samples for {len(planned)}, or in other atoms"


def _verdict(run: Place, entries: list[LedgerEntry], plan: Plan, done: int) -> str:
    samples, epochs = _number(plan.num_samples, "sample"), _number(plan.epochs, "epoch")
    attempts = _number(newest_attempt(run), "attempt")
    sizes = {entry.world_size for entry in entries}
    worlds = f"world size {min(sizes)}" if len(sizes) == 1 else f"world sizes {min(sizes)}..{max(sizes)}"
    how = f"{attempts}, {worlds}"
    if done < plan.num_steps:
        whole = done // plan.steps_per_epoch
        told = f"exactly once so far: {done} of {plan.num_steps} steps, {whole} of {epochs} of {samples} whole, {how}"
    else:
        told = f"exactly once: {samples} x {epochs}, {_number(done, 'step')}, {how}"
    rest = plan.num_samples % plan.global_batch
    if rest and plan.tail == "drop":
        told += f"; data.tail=drop: {_number(rest, 'sample')} an epoch not counted"
    if rest and plan.tail == "repeat":
        told += f"; data.tail=repeat: {_number(plan.global_batch - rest, 'sample')} an epoch counted again"
    rejected = {key: reason for entry in entries for key, reason in entry.rejected.items()}
    if rejected:
        told += f"; without weight {len(rejected)}: {_some(f'{key} ({reason})' for key, reason in rejected.items())}"
    return told


def _row_keys(shards: ShardManifest) -> pa.Array:
    """Return the key of every row, in row order: see rayllava.data.shards.sample_key."""
    columns = ["source", "line", "copy"]
    with ThreadPoolExecutor(_READERS) as pool:
        tables = pool.map(lambda shard: _read(shards.dir / shard.file, columns), shards.shards)
        table = pa.concat_tables(tables).combine_chunks()
    source, line, copy = (pc.cast(table[name], pa.string()) for name in columns)
    key = pc.binary_join_element_wise(source, line, ":")
    copied = pc.binary_join_element_wise(key, copy, "#")
    return pc.if_else(pc.equal(table["copy"], 0), key, copied).combine_chunks()


def _read(place: Place, columns: list[str]) -> pa.Table:
    return pq.ParquetFile(place.open() if place.remote else place.local, pre_buffer=place.remote).read(columns)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_NAMED]) + (", ..." if len(listed) > _NAMED else "")


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
