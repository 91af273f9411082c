"""Plan -> Ray Data: the rows that feed the workers of one attempt.

    one step of the plan --task on any CPU--> its atoms, dealt to W ranks, dummies in the gaps
                                              each read, decoded, encoded, collated: one Arrow row a rank's atom
    rows leave in the order (step, slot, rank); streaming_split hands row j to rank j mod W

Both halves stand here: `rows` makes the dataset on the driver's side, `feed` reads a rank's rows in the worker.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayllava.checkpoint.store import Decision, read_decision, read_run
from rayllava.data.plan import Atom, Plan
from rayllava.data.shards import ShardReader
from rayllava.prompt.collate import collate, dummy, from_row, to_row
from rayllava.prompt.encode import Processor, SampleError
from rayllava.records import IGNORE, Batch, Example

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset

log = logging.getLogger(__name__)

_AHEAD = 4
"""Atoms a worker fetches before it needs them."""


def rows(run_dir: Path, decision: Decision) -> Dataset:
    """Return the dataset of an attempt: the rows of every step from the cursor to the end, in order."""
    import ray
    from ray.data import ExecutionOptions, ExecutionResources

    manifest = read_run(run_dir)
    num_steps = manifest.num_steps - decision.cursor
    dataset = ray.data.range(num_steps, override_num_blocks=max(1, num_steps))
    dataset = dataset.map_batches(
        step_rows,  # type: ignore[arg-type]  # the stub knows no fn_kwargs
        batch_size=None,
        fn_kwargs={"run_dir": str(run_dir), "attempt": decision.attempt},
        num_cpus=1,
    )
    context = dataset.context
    context.target_max_block_size = 1  # every yielded row becomes a block of its own: the unit of dealing
    context.execution_options = ExecutionOptions(
        preserve_order=True,
        resource_limits=ExecutionResources.for_limits(cpu=manifest.recipe.scale.decoders),
    )
    context.enable_progress_bars = False
    return dataset


def step_rows(batch: Any, *, run_dir: str, attempt: int) -> Iterator[Any]:
    """Yield the rows of the steps in `batch["id"]`, counted from the attempt's cursor, each a table of one row."""
    decision, plan, reader, processor = _open(run_dir, attempt)
    for offset in batch["id"].tolist():
        index = decision.cursor + offset
        shares = plan.share(index, decision.world_size)
        for slot in range(len(shares[0])):
            for rank, share in enumerate(shares):
                made, rejected = _make(share[slot], reader, processor)
                row = to_row(
                    made,
                    attempt=attempt,
                    step=index,
                    epoch=plan.epoch_of(index),
                    rank=rank,
                    slots=len(shares[0]),
                    rejected=rejected,
                )
                yield {key: [value] for key, value in row.items()}


def feed(
    shard: DataIterator, decision: Decision, *, rank: int, num_steps: int
) -> Iterator[tuple[int, int, list[Batch], list[str]]]:
    """Yield (step, epoch, atoms, rejected) of this rank, and check that every row is the promised one."""
    tables: Any = shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=_AHEAD)
    rows_ = ({name: table[name][0] for name in table.column_names} for table in tables)  # not copied
    for step in range(decision.cursor, num_steps):
        atoms: list[Batch] = []
        rejected: list[str] = []
        slots = 1
        while len(atoms) < slots:
            row = next(rows_)
            got = tuple(row[name].as_py() for name in ("attempt", "step", "rank"))
            assert got == (decision.attempt, step, rank), f"row {got} came for {(decision.attempt, step, rank)}"
            slots = row["slots"].as_py()
            atoms.append(from_row(row))
            rejected += row["rejected"].as_py()
        yield step, row["epoch"].as_py(), atoms, rejected


def _make(atom: Atom | None, reader: ShardReader, processor: Processor) -> tuple[Batch, list[str]]:
    """Return an atom's batch and the samples that had to be left out, as `id: reason`.

    Sharding has decoded every picture, so what fails here fails always: text that does not fit the template or
    the length limit. It keeps its place with no weight, since a plan cannot change while it runs.
    """
    if atom is None:
        return dummy(processor.spec), []
    examples: list[Example] = []
    rejected: list[str] = []
    for sample in reader.read(atom.samples):
        try:
            examples.append(processor.encode(sample))
        except SampleError as error:
            rejected.append(f"{sample.id}: {error}")
            examples.append(_empty(sample.id, processor))
    return collate(examples, pad_token_id=processor.spec.pad_token_id), rejected


def _empty(sample_id: str, processor: Processor) -> Example:
    size = processor.spec.image_size
    ids = np.full(2, processor.spec.pad_token_id, dtype=np.int32)
    labels = np.full(2, IGNORE, dtype=np.int32)
    return Example(sample_id, ids, labels, np.zeros((0, 3, size, size), dtype=np.uint8))


@lru_cache(maxsize=2)
def _open(run_dir: str, attempt: int) -> tuple[Decision, Plan, ShardReader, Processor]:
    """Open what a task needs, once a process: all of it small, read from the run's folder."""
    manifest = read_run(Path(run_dir))
    recipe = manifest.recipe
    reader = ShardReader(recipe.data.shards)
    assert reader.manifest.digest == manifest.shards_digest, f"{recipe.data.shards} changed during the run"
    plan = Plan.of(
        reader.manifest, recipe.data, seed=recipe.seed, num_image_tokens=manifest.processor.num_image_tokens
    )
    processor = Processor(manifest.processor, Path(run_dir) / "tokenizer")
    return read_decision(Path(run_dir), attempt), plan, reader, processor
