"""Plan -> batches: the atoms of every step, in order, from a cursor on, with Ray Data or without Ray.

    one step of the plan --task on any CPU--> its atoms, dealt to W ranks, dummies in the gaps
                                              each read, decoded, encoded, collated: one Arrow row a rank's atom
    rows leave in the order (step, slot, rank); streaming_split hands row j to rank j mod W

`rows` makes the dataset on the driver's side, `feed` reads a rank's rows in the worker; `stream` does both in
one process with threads. All three give the same atoms, whatever the number of workers.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rayllava import copies
from rayllava.data.plan import GROUP, WINDOW, Atom, Plan, plan_of
from rayllava.data.shards import ShardManifest, ShardReader
from rayllava.place import Place
from rayllava.prompt.collate import collate, dummy, from_table, to_table
from rayllava.prompt.encode import Processor, SampleError
from rayllava.recipe import DataSpec, ProcessorSpec
from rayllava.records import IGNORE, Batch, Example
from rayllava.spec import Spec

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset

_AHEAD = 4
"""Atoms a worker fetches before it needs them."""
_STEPS_HELD = 8
"""Steps whose rows may lie in the object store before the readers have to wait."""
_LEAST_HELD = 1 << 29
"""Bytes that Ray Data may hold; with less it deals its operators too little to go on."""


class StreamSpec(Spec):
    """All that decides the batches of one attempt: plain values that travel to every task."""

    shards: str
    shards_digest: str
    data: DataSpec
    seed: int
    processor: ProcessorSpec
    tokenizer_dir: str
    """On a disk or in a store."""
    lengths: str = ""
    """File of exact lengths, which packing needs; see rayllava.data.measure."""
    attempt: int = 1
    cursor: int = 0
    """0-based index of the first step."""
    world_size: int = 1
    decoders: int = 2
    """CPUs that read, decode and encode."""


class Fed(NamedTuple):
    """What one rank computes of one step."""

    step: int
    """0-based."""
    epoch: int
    atoms: list[Batch]
    rejected: list[tuple[str, str]]
    """Key and reason of samples that keep their place without weight."""


def stream(spec: StreamSpec, *, rank: int = 0, threads: int = 2) -> Iterator[Fed]:
    """Yield this rank's part of every step from the cursor on, without Ray."""
    desk = Desk.open(spec)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        waiting: deque[tuple[int, list[Future[tuple[Batch, list[tuple[str, str]]]]]]] = deque()
        steps = iter(range(spec.cursor, desk.plan.num_steps))
        ahead = 0
        while True:
            # The step that is due and, while it is waited for and used, enough behind it to keep the threads busy.
            while (len(waiting) < 2 or ahead < 2 * threads) and (index := next(steps, None)) is not None:
                share = desk.plan.share(index, spec.world_size)[rank]
                ahead += len(share) if waiting else 0
                waiting.append((index, [pool.submit(desk.make, atom) for atom in share]))
            if not waiting:
                return
            index, futures = waiting.popleft()
            ahead -= len(waiting[0][1]) if waiting else 0
            made = [future.result() for future in futures]
            rejected = [pair for _, pairs in made for pair in pairs]
            yield Fed(index, desk.plan.epoch_of(index), [batch for batch, _ in made], rejected)


def rows(spec: StreamSpec, *, on: Sequence[str] = ()) -> Dataset:
    """Return the dataset of an attempt: the rows of every step from the cursor to the end, in order.

    They are made on the nodes whose ids are in `on`; without any, on all that there are and come.
    """
    import ray
    from ray.data import ExecutionOptions, ExecutionResources

    from rayllava.data.ahead import bound
    from rayllava.data.steps import Steps

    where: dict[str, Any] = {"label_selector": {"ray.io/node-id": f"in({','.join(on)})"}} if on else {}
    plan = Desk.open(spec).plan
    steps = Steps(plan.num_steps - spec.cursor)
    # Without a CPU of its own, which also keeps Ray Data from making one task of the two operators.
    dataset = ray.data.read_datasource(steps, num_cpus=0, override_num_blocks=1, **where)
    dataset = dataset.map_batches(
        step_rows,  # type: ignore[arg-type]  # the stub knows no fn_kwargs
        batch_size=None,
        fn_kwargs={"text": spec.model_dump_json()},
        num_cpus=1,
        **where,
    )
    context = dataset.context
    context.target_max_block_size = 1  # every yielded row becomes a block of its own: the unit of dealing
    context.execution_options = ExecutionOptions(
        preserve_order=True,
        resource_limits=ExecutionResources.for_limits(cpu=spec.decoders, object_store_memory=_most_held(spec)),
    )
    a_step = sum(map(len, plan.share(spec.cursor, spec.world_size))) if steps.num else 0
    bound(context, steps=2 * spec.decoders, rows=_STEPS_HELD * a_step)
    context.enable_progress_bars = False
    return dataset


def step_rows(batch: Any, *, text: str) -> Iterator[Any]:
    """Yield the rows of the steps in `batch["id"]`, counted from the cursor, each a table of one row."""
    desk = _desk(text)
    spec = desk.spec
    for offset in batch["id"].tolist():
        index = spec.cursor + offset
        shares = desk.plan.share(index, spec.world_size)
        for slot in range(len(shares[0])):
            for rank, share in enumerate(shares):
                made, rejected = desk.make(share[slot])
                yield to_table(
                    made,
                    rejected=rejected,
                    attempt=spec.attempt,
                    step=index,
                    epoch=desk.plan.epoch_of(index),
                    rank=rank,
                    slots=len(shares[0]),
                )


def feed(shard: DataIterator, spec: StreamSpec, *, rank: int = 0) -> Iterator[Fed]:
    """Yield this rank's part of every step from its rows, and check that every row is the promised one.

    They are asked for and put together in a thread, from now on and a step ahead of whoever takes them.
    """
    return _ahead(_fed(shard, spec, rank=rank))


def _ahead(fed: Iterator[Fed]) -> Iterator[Fed]:
    """Return an iterator whose next element is on its way while somebody uses the last."""
    ready: Queue[tuple[Fed | None, BaseException | None]] = Queue(maxsize=1)
    left = threading.Event()

    def fetch() -> None:
        try:
            for one in fed:
                ready.put((one, None))
                if left.is_set():
                    return
            ready.put((None, None))
        except BaseException as error:
            ready.put((None, error))

    threading.Thread(target=fetch, name="rows", daemon=True).start()

    def each() -> Iterator[Fed]:
        try:
            while True:
                one, error = ready.get()
                if error:
                    raise error
                if one is None:
                    return
                yield one
        finally:  # nobody takes what is on its way
            left.set()
            with suppress(Empty):
                ready.get_nowait()

    return each()


def _fed(shard: DataIterator, spec: StreamSpec, *, rank: int) -> Iterator[Fed]:
    tables: Any = iter(shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=_AHEAD))
    due = spec.cursor
    for table in tables:
        atoms: list[Batch] = []
        rejected: list[tuple[str, str]] = []
        while True:
            row = table.select(["attempt", "step", "rank", "epoch", "slots", "rejected", "reasons"]).to_pylist()[0]
            got = (row["attempt"], row["step"], row["rank"])
            assert got == (spec.attempt, due, rank), f"row {got} came for {(spec.attempt, due, rank)}"
            atoms.append(from_table(table))
            rejected += zip(row["rejected"], row["reasons"], strict=True)
            if len(atoms) == row["slots"]:
                break
            table = next(tables)
        yield Fed(due, row["epoch"], atoms, rejected)
        due += 1


def open_plan(spec: StreamSpec, shards: ShardManifest | None = None) -> Plan:
    """Return the plan that a stream follows."""
    lengths = Place(spec.lengths) if spec.lengths else None
    manifest = shards or ShardManifest.load(spec.shards)
    return plan_of(manifest, spec.data, spec.processor, seed=spec.seed, lengths=lengths)


class Desk:
    """What makes atoms in one process: small, read from the shard folder and the spec alone."""

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        data = spec.data
        grouped = 0 if data.group == "none" else -(-data.group_window * data.global_batch // GROUP)
        self.reader = ShardReader(spec.shards, num_groups=WINDOW + grouped)
        assert self.reader.manifest.digest == spec.shards_digest, f"{spec.shards} changed during the run"
        self.plan = open_plan(spec, self.reader.manifest)
        self.processor = Processor(spec.processor, copies.local(Place(spec.tokenizer_dir)))

    @staticmethod
    def open(spec: StreamSpec) -> Desk:
        """Return the desk of a spec; one process needs it once."""
        return _desk(spec.model_dump_json())

    def make(self, atom: Atom | None) -> tuple[Batch, list[tuple[str, str]]]:
        """Return an atom's batch, and key and reason of the samples that had to be left out.

        Sharding has decoded every picture, so what fails here fails always: text that does not fit the template
        or the length limit. It keeps its place with no weight, since a plan cannot change while it runs.
        """
        processor = self.processor
        if atom is None:
            return dummy(processor.spec), []
        examples: list[Example] = []
        rejected: list[tuple[str, str]] = []
        for sample in self.reader.read(atom.samples):
            try:
                examples.append(processor.encode(sample))
            except SampleError as error:
                rejected.append((sample.key, str(error)))
                examples.append(_empty(sample.key, processor))
        packed = self.spec.data.max_tokens is not None
        batch = collate(examples, pad_token_id=processor.spec.pad_token_id, packed=packed, index=atom.index)
        most = self.spec.data.max_tokens
        assert most is None or batch.ids.size <= most, f"{batch.ids.size} positions packed into {most}"
        return batch, rejected


def _empty(key: str, processor: Processor) -> Example:
    size = processor.spec.image_size
    ids = np.full(NUM_EMPTY, processor.spec.pad_token_id, dtype=np.int32)
    labels = np.full(NUM_EMPTY, IGNORE, dtype=np.int32)
    return Example(key, ids, labels, np.zeros((0, 3, size, size), dtype=np.uint8))


NUM_EMPTY = 2
"""Positions of an example that stands for a sample left out."""


@lru_cache(maxsize=2)
def _desk(text: str) -> Desk:
    return Desk(StreamSpec.model_validate_json(text))


def _most_held(spec: StreamSpec) -> int:
    """Return the bytes of finished rows that may wait in the object store."""
    picture = 3 * spec.processor.image_size**2
    return max(_LEAST_HELD, _STEPS_HELD * spec.data.global_batch * picture)
