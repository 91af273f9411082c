"""The stream: through kills and resizes every step holds the same atoms, bit for bit, with Ray Data or without."""

from __future__ import annotations

import itertools
import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayllava.data.ingest import ShardSpec
from rayllava.data.measure import measure
from rayllava.data.sharding import write_shards
from rayllava.data.shards import ShardManifest, ShardReader
from rayllava.data.steps import Steps
from rayllava.data.stream import Desk, Fed, StreamSpec, feed, rows, stream
from rayllava.place import Place
from rayllava.recipe import DataSpec, ProcessorSpec
from rayllava.records import Batch
from tests.data.annotated import Folder
from tests.data.store import bucket

Atoms = dict[int, set[tuple[Any, ...]]]
"""What each step holds: its atoms by their bytes."""


def spec_of(shards: str, processor: tuple[ProcessorSpec, str], **words: Any) -> StreamSpec:
    data = {"global_batch": 9, "atom": 2} | words.pop("data", {})
    return StreamSpec(
        shards=shards,
        shards_digest=ShardManifest.load(shards).digest,
        data=DataSpec(**data),
        processor=processor[0],
        tokenizer_dir=processor[1],
        **({"seed": 3} | words),
    )


def bits(batch: Batch) -> tuple[Any, ...]:
    arrays = (batch.ids, batch.labels, batch.positions, batch.lengths, batch.pixels)
    return (batch.sample_ids, batch.packed, batch.index, *((array.shape, array.tobytes()) for array in arrays))


def gather(steps: list[Fed], into: Atoms) -> None:
    for fed in steps:
        assert not fed.rejected
        held = [bits(batch) for batch in fed.atoms if batch.sample_ids]
        into.setdefault(fed.step, set()).update(held)


def undisturbed(spec: StreamSpec) -> Atoms:
    found: Atoms = {}
    gather(list(stream(spec)), found)
    return found


def attempt(spec: StreamSpec, stop: int) -> Atoms:
    """Feed W ranks through Ray Data until they have done the steps before `stop`."""
    splits = rows(spec).streaming_split(spec.world_size, equal=True, locality_hints=None)

    def one(rank: int) -> list[Fed]:
        fed = feed(splits[rank], spec, rank=rank)
        return list(itertools.islice(fed, stop - spec.cursor))

    with ThreadPoolExecutor(spec.world_size) as pool:
        ranks = list(pool.map(one, range(spec.world_size)))
    assert len({tuple((fed.step, len(fed.atoms)) for fed in steps) for steps in ranks}) == 1, "ranks out of step"
    found: Atoms = {}
    for steps in ranks:
        gather(steps, found)
    return found


@pytest.mark.parametrize(
    "number", [*range(8), *(pytest.param(number, marks=pytest.mark.slow) for number in range(8, 20))]
)
def test_a_disturbed_run_computes_what_an_undisturbed_one_does(
    number: int, dialogues: Path, processor: tuple[ProcessorSpec, str], tmp_path: Path
) -> None:
    draw = random.Random(number)
    data: dict[str, Any] = {
        "global_batch": draw.choice([7, 9, 12]),
        "epochs": draw.choice([1, 2]),
        "tail": draw.choice(["short", "drop", "repeat"]),
        "group": draw.choice(["none", "none", "modality", "length"]),
        "group_window": 3,
    }
    lengths = ""
    if number % 4 == 0:
        data["max_tokens"] = 512
        lengths = str(tmp_path / "lengths.npy")
        measure(ShardManifest.load(dialogues), processor[0], Place(processor[1]), Place(lengths))
    spec = spec_of(str(dialogues), processor, data=data, seed=number, lengths=lengths)
    whole = undisturbed(spec)
    plan = Desk.open(spec).plan
    committed: Atoms = {}
    cursor, tries = 0, 0
    while cursor < plan.num_steps:
        tries += 1
        workers = draw.randint(1, plan.max_workers)
        stop = plan.num_steps if tries == 2 + (number % 5 == 0) else draw.randint(cursor + 1, plan.num_steps)
        now = spec.but(attempt=tries, cursor=cursor, world_size=workers, decoders=2)
        found = attempt(now, stop)
        # What was saved before the kill stays; the steps after it are computed again.
        saved = stop if stop == plan.num_steps else draw.randint(cursor, stop)
        committed |= {step: atoms for step, atoms in found.items() if step < saved}
        for step, atoms in found.items():
            assert atoms == whole[step], f"step {step} at W={workers}"
        cursor = saved
    assert committed == whole
    if data["tail"] == "short":
        ids = sorted(sample for atoms in committed.values() for atom in atoms for sample in atom[0])
        assert ids == sorted([f"dialogues.json:{n + 1}" for n in range(60)] * data["epochs"])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_plain_threads_share_a_step_as_workers_do(
    world_size: int, dialogues: Path, processor: tuple[ProcessorSpec, str]
) -> None:
    spec = spec_of(str(dialogues), processor, world_size=world_size)
    whole = undisturbed(spec.but(world_size=1))
    found: Atoms = {}
    for rank in range(world_size):
        gather(list(stream(spec, rank=rank, threads=1 + rank)), found)
    assert found == whole


def test_a_stream_starts_at_any_step(dialogues: Path, processor: tuple[ProcessorSpec, str]) -> None:
    spec = spec_of(str(dialogues), processor)
    steps = [fed.step for fed in stream(spec)]
    assert steps == list(range(7))
    for cursor in (1, 6):
        assert [fed.step for fed in stream(spec.but(cursor=cursor))] == steps[cursor:]
    assert list(stream(spec.but(cursor=7))) == []


def test_shards_that_changed_are_noticed(dialogues: Path, processor: tuple[ProcessorSpec, str]) -> None:
    with pytest.raises(AssertionError, match="changed during the run"):
        next(stream(spec_of(str(dialogues), processor).but(shards_digest="other")))


def test_measured_lengths_are_those_of_the_batches(
    dialogues: Path, processor: tuple[ProcessorSpec, str], tmp_path: Path
) -> None:
    path = tmp_path / "lengths.npy"
    measure(ShardManifest.load(dialogues), processor[0], Place(processor[1]), Place(str(path)))
    lengths = np.load(path)
    desk = Desk.open(spec_of(str(dialogues), processor))
    samples = desk.reader.read(range(60))
    assert lengths.tolist() == [len(desk.processor.encode(sample).ids) for sample in samples]


def test_a_sample_without_room_keeps_its_place(dialogues: Path, processor: tuple[ProcessorSpec, str]) -> None:
    tight = processor[0].but(max_length=160)  # less than the question takes
    fed = list(stream(spec_of(str(dialogues), (tight, processor[1]))))
    assert sum(len(batch.sample_ids) for step in fed for batch in step.atoms) == 60
    rejected = [line for step in fed for line in step.rejected]
    assert rejected and all("max_length=160 leaves no room for an answer" in reason for _, reason in rejected)
    assert {key for key, _ in rejected} <= {key for step in fed for batch in step.atoms for key in batch.sample_ids}


def test_shards_in_a_store_are_those_on_a_disk(
    ray_local: None, processor: tuple[ProcessorSpec, str], tmp_path: Path
) -> None:
    folder = Folder(tmp_path, 90)
    with bucket("data") as address:
        for path in [folder.annotations, *folder.images.iterdir()]:
            place = Place(address.format(path.relative_to(tmp_path)))
            place.write_bytes(path.read_bytes())
        raw, out = Place(address.format("a.json")), Place(address.format("shards/mine"))
        there = write_shards("llava", raw, out, spec=ShardSpec(images=address.format("images"), rows=40))
        spec = ShardSpec(images=str(folder.images), rows=40)
        here = write_shards("llava", Place(str(folder.annotations)), Place(str(tmp_path / "out")), spec=spec)
        assert (there.digest, there.counts) != ("", {}) and there.digest == here.digest
        assert not [place for place in out.files() if "unfinished" in str(place)]
        assert ShardReader(out).read(range(90)) == ShardReader(tmp_path / "out").read(range(90))
        words = {"data": {"atom": 3}}
        assert undisturbed(spec_of(out.text, processor, **words)) == undisturbed(
            spec_of(str(tmp_path / "out"), processor, **words)
        )
        assert write_shards("llava", raw, out, spec=ShardSpec(images=address.format("images"), rows=40)) == there


def test_the_steps_of_a_run_are_handed_out_by_one_task() -> None:
    """A task for each, known before the first runs, would hold up the restart of a long run by many seconds."""
    (task,) = Steps(100_000).get_read_tasks(1)
    assert task.metadata.num_rows == 100_000
    assert [block.to_pydict() for block in itertools.islice(task(), 70)] == [{"id": [step]} for step in range(70)]


def test_a_stream_runs_no_further_ahead_than_a_few_steps(
    dialogues: Path, processor: tuple[ProcessorSpec, str]
) -> None:
    """Small rows fit into any store by the thousand; making them takes the cores from whoever trains."""
    spec = spec_of(str(dialogues), processor, data={"epochs": 50})
    (split,) = rows(spec).streaming_split(1, equal=True)
    taken: Any = iter(split.iter_batches(batch_size=1, batch_format="pyarrow"))
    next(taken)
    made = 0
    while (now := _made(split.stats())) != made:
        made = now
        time.sleep(3)
    taken.close()
    a_step = len(Desk.open(spec).plan.share(0, 1)[0])
    assert 8 * a_step <= made <= 20 * a_step


def _made(stats: str) -> int:
    """Return the rows that Ray Data has made so far."""
    told = re.findall(r"Total output num rows: (\d+)", stats)
    return int(told[-1]) if told else 0


def test_rows_are_asked_for_before_anybody_takes_one(dialogues: Path, processor: tuple[ProcessorSpec, str]) -> None:
    asked = threading.Event()

    class Shard:
        def iter_batches(self, **words: Any) -> Iterator[Any]:
            asked.set()
            return iter([])

    left = feed(Shard(), spec_of(str(dialogues), processor))  # type: ignore[arg-type]
    assert asked.wait(timeout=30)
    assert list(left) == []
