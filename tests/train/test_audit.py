"""The audit passes what counted every sample once, through kills and resizes, and names what did not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayllava import durable
from rayllava.checkpoint.lease import Lease
from rayllava.checkpoint.ledger import LedgerEntry
from rayllava.checkpoint.run import RunManifest, write_run
from rayllava.checkpoint.saver import Saver
from rayllava.checkpoint.store import MANIFEST, Store, decide, read_checkpoint
from rayllava.data.measure import lengths_of
from rayllava.data.shards import FORMAT, ROW_FILES, Shard, ShardManifest, write_parquet
from rayllava.data.stream import Desk, StreamSpec, stream
from rayllava.place import Place
from rayllava.recipe import DataSpec, OptimSpec, ProcessorSpec, Projector, PromptSpec, Recipe
from rayllava.records import Sample, Turn
from rayllava.train.audit import audit
from tests.data.store import bucket

ROOT = Path(__file__).resolve().parents[2]
NUM = 50
LONG = 17
"""The row whose question leaves no room for an answer."""

Change = Callable[[LedgerEntry], LedgerEntry]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardManifest:
    """Fifty rows in two shards; every fifth is a second copy, and seven rows share one key."""
    folder = tmp_path_factory.mktemp("shards")
    rows = []
    for n in range(NUM):
        question = "what is shown? " * (60 if n == LONG else n % 4 + 1)
        turns = (Turn("user", question), Turn("assistant", f"the number {n}"))
        line = 7 if n in range(40, 47) else n - 1 if n % 5 == 4 else n
        origin = {"source": "a" if n % 2 else "b:c", "line": line, "copy": int(n % 5 == 4)}
        origin |= {"source": "refcoco", "copy": 0} if line == 7 and n != 7 else {}
        rows.append((Sample(str(n), turns), origin))
    random.Random(0).shuffle(rows)
    made = []
    for number, cut in enumerate((rows[:30], rows[30:])):
        path = folder / f"shard-{number}.parquet"
        write_parquet(path, cut)
        made.append(Shard(path.name, len(cut), -(-len(cut) // 16), durable.digest(path)))
    counts = [[0] * NUM, [sum(len(turn.text) for turn in sample.turns) for sample, _ in rows]]
    for (name, dtype), values in zip(ROW_FILES.items(), counts, strict=True):
        np.save(folder / f"{name}.npy", np.array(values, dtype))
    manifest = ShardManifest(
        dir=Place(str(folder)),
        shards=tuple(made),
        row_files={},
        rows_per_group=16,
        origin={},
        counts={"samples": NUM},
        mended={},
        digest=durable.digest_of([FORMAT, [shard.digest for shard in made]]),
    )
    manifest.save()
    return manifest


def begin(
    run: Place, shards: ShardManifest, processor: tuple[ProcessorSpec, str], *, seed: int = 3, **data: Any
) -> StreamSpec:
    """Write a run's manifest as a training job does, and return what it is fed."""
    words = DataSpec(**({"shards": str(shards.dir), "global_batch": 8, "atom": 3} | data))
    lengths = ""
    if words.max_tokens:
        found = [lengths_of(shards, n, processor[0], Place(processor[1])) for n in range(len(shards.shards))]
        np.save(run.local / "lengths.npy", np.concatenate(found))
        lengths = str(run.local / "lengths.npy")
    spec = StreamSpec(
        shards=words.shards,
        shards_digest=shards.digest,
        data=words,
        seed=seed,
        processor=processor[0],
        tokenizer_dir=processor[1],
        lengths=lengths,
    )
    recipe = Recipe(
        prompt=PromptSpec(template="vicuna_v1", max_length=256),
        tuning=Projector(),
        data=words,
        optim=OptimSpec(lr=1e-3),
        out=run.text,
        seed=seed,
    )
    num_steps = Desk.open(spec).plan.num_steps
    write_run(
        run, RunManifest(recipe=recipe, processor=processor[0], shards_digest=shards.digest, num_steps=num_steps)
    )
    return spec


def attempt(run: Place, driver: str, spec: StreamSpec, *, world_size: int, saves: list[int], change: Change) -> None:
    """Compute steps on `world_size` ranks up to the last of `saves`, and save there."""
    decision = decide(run, world_size=world_size, driver=driver)
    now = spec.but(attempt=decision.attempt, cursor=decision.cursor, world_size=world_size)
    ranks = [stream(now, rank=rank, threads=1) for rank in range(world_size)]
    words = {"attempt": decision.attempt, "world_size": world_size, "keep": 2}
    savers = [Saver(Store(run), rank=rank, **words) for rank in range(world_size)]
    for save in saves:
        for rank, saver in enumerate(savers):
            entries = []
            while not entries or entries[-1].step < save:
                step, epoch, batches, rejected = next(ranks[rank])
                atoms = {batch.index: batch.sample_ids for batch in batches if batch.sample_ids}
                entries.append(
                    change(LedgerEntry(step + 1, epoch, world_size, decision.attempt, atoms, dict(rejected)))
                )
            saver.start(save, {"param/a": torch.zeros(3)} if rank == 0 else {}, entries)
        for saver in savers:
            saver.wait()


def whole(run: Place, spec: StreamSpec, change: Change = lambda entry: entry, *, stop: int | None = None) -> None:
    """Train in three attempts at W=1, 3 and 2; what the first saved last is torn, so that it is redone."""
    stop = stop or Desk.open(spec).plan.num_steps
    with Lease(run) as lease:
        attempt(run, lease.id, spec, world_size=1, saves=[1, 3], change=change)
        (Store(run).folder(3) / MANIFEST).remove()
        attempt(run, lease.id, spec, world_size=3, saves=[2, 5], change=change)
        attempt(run, lease.id, spec, world_size=2, saves=[stop], change=change)


@pytest.fixture
def run(tmp_path: Path) -> Place:
    (tmp_path / "run").mkdir()
    return Place(str(tmp_path / "run"))


def test_a_disturbed_run_passes(run: Place, shards: ShardManifest, processor: tuple[ProcessorSpec, str]) -> None:
    whole(run, begin(run, shards, processor))
    found = audit(run)
    assert found.passed, found.text()
    assert found.text().startswith(
        "exactly once: 50 samples x 1 epoch, 7 steps, 3 attempts, world sizes 1..3; without weight 1: a:17 ("
    )
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_bytes().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 8))
    keys = sorted(key for line in lines for atom in line["atoms"] for key in atom["samples"])
    assert len(keys) == 50 and keys.count("refcoco:7") == 7 and "b:c:3#1" in keys
    assert [key for line in lines for key in line["rejected"]] == ["a:17"]


@pytest.mark.parametrize("tail", ["short", "drop", "repeat"])
@pytest.mark.parametrize("kind", ["plain", "modality", "length", "packed"])
def test_every_plan_is_followed_over_epochs(
    tail: str, kind: str, run: Place, shards: ShardManifest, processor: tuple[ProcessorSpec, str]
) -> None:
    more: dict[str, Any] = {} if kind == "plain" else {"max_tokens": 256} if kind == "packed" else {"group": kind}
    whole(run, begin(run, shards, processor, tail=tail, epochs=2, group_window=3, **more))
    found = audit(run)
    assert found.passed, found.text()
    told = found.text()
    assert told.startswith(f"exactly once: 50 samples x 2 epochs, {12 if tail == 'drop' else 14} steps")
    assert ("data.tail=drop: 2 samples an epoch not counted" in told) == (tail == "drop")
    assert ("data.tail=repeat: 6 samples an epoch counted again" in told) == (tail == "repeat")


def test_an_unfinished_run_passes_as_far_as_it_is(
    run: Place, shards: ShardManifest, processor: tuple[ProcessorSpec, str]
) -> None:
    whole(run, begin(run, shards, processor, epochs=3), stop=9)
    found = audit(run)
    assert found.passed and found.text().startswith(
        "exactly once so far: 9 of 21 steps, 1 of 3 epochs of 50 samples whole, 3 attempts, world sizes 1..3"
    )


def in_step_4(make: Callable[[tuple[str, ...]], tuple[str, ...]]) -> Change:
    """Return what changes the samples of the first atom of step 4, and nothing else."""

    def change(entry: LedgerEntry) -> LedgerEntry:
        if entry.step != 4 or 0 not in entry.atoms:
            return entry
        return replace(entry, atoms={**entry.atoms, 0: make(entry.atoms[0])})

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            in_step_4(lambda atom: atom[1:]),
            ["samples that were left out: 1", "in epoch 0: 0 times, not 1", "step 4: "],
        ),
        (in_step_4(lambda atom: (*atom, atom[0])), ["samples that were counted too often: 1", "2 times, not 1"]),
        (in_step_4(lambda atom: (atom[1], atom[1], *atom[2:])), ["left out: 1", "too often: 1", "step 4: "]),
        (in_step_4(lambda atom: atom[::-1]), ["steps that are not as planned: 1", "step 4: 8 samples for 8, or in"]),
        (in_step_4(lambda atom: ("z:1", *atom[1:])), ["the shards do not hold: 1", "z:1 in step 4", "left out: 1"]),
        (
            lambda entry: replace(entry, epoch=entry.epoch + (entry.step == 4)),
            ["samples that were left out", "steps that are not as planned: 1"],
        ),
    ],
    ids=["dropped", "doubled", "replaced", "reordered", "strange", "epoch"],
)
def test_a_ledger_that_is_not_the_plan_fails(
    change: Change,
    said: list[str],
    run: Place,
    shards: ShardManifest,
    processor: tuple[ProcessorSpec, str],
) -> None:
    whole(run, begin(run, shards, processor), change)
    found = audit(run)
    assert not found.passed and all(words in found.text() for words in said), found.text()


def test_what_an_unfinished_epoch_counted_twice_is_found(
    run: Place, shards: ShardManifest, processor: tuple[ProcessorSpec, str]
) -> None:
    whole(run, begin(run, shards, processor), in_step_4(lambda atom: (*atom, atom[0])), stop=6)
    assert "samples that were counted too often: 1" in audit(run).text()
    assert "left out" not in audit(run).text()


def test_a_flipped_or_missing_segment_fails_and_nothing_is_derived_from_it(
    run: Place, shards: ShardManifest, processor: tuple[ProcessorSpec, str]
) -> None:
    whole(run, begin(run, shards, processor))
    place = run / "ledger/000002-000002.2.jsonl"
    content = place.read_bytes()
    place.write_bytes(content.replace(b'"world_size":3', b'"world_size":2'))
    found = audit(run)
    assert "broken chain: 1" in found.text() and "000002-000002.2.jsonl does not match its digest" in found.text()
    assert "steps that are not in the ledger: 2\n  step 1\n  step 2" in found.text()
    assert not (run / "ledger.jsonl").is_file()
    place.remove()
    assert "000002-000002.2.jsonl is missing" in audit(run).text()
    place.write_bytes(content)
    assert audit(run).passed


def test_a_chain_that_leaves_steps_out_fails(
    run: Place, shards: ShardManifest, processor: tuple[ProcessorSpec, str]
) -> None:
    whole(run, begin(run, shards, processor))
    folder = Store(run).folder(7)
    manifest = read_checkpoint(folder)
    before = read_checkpoint(Store(run).folder(5)).ledger
    (folder / MANIFEST).write_bytes(manifest.but(ledger=before).sealed().model_dump_json().encode())
    assert "steps that are not in the ledger: 2\n  step 6\n  step 7" in audit(run).text()


def test_runs_without_a_checkpoint_and_changed_shards_are_refused(
    run: Place, shards: ShardManifest, processor: tuple[ProcessorSpec, str]
) -> None:
    spec = begin(run, shards, processor)
    with pytest.raises(ValueError, match=r"RUN=.* has no whole checkpoint yet"):
        audit(run)
    whole(run, spec)
    manifest = json.loads((run / "manifest.json").read_bytes())
    (run / "manifest.json").write_bytes(json.dumps(manifest | {"shards_digest": "other"}).encode())
    with pytest.raises(ValueError, match=r"data=.* changed since RUN=.* began"):
        audit(run)


def test_a_run_in_a_store_is_audited_there(
    tmp_path: Path, shards: ShardManifest, processor: tuple[ProcessorSpec, str]
) -> None:
    with bucket("runs") as address:
        run = Place(address.format("mine"))
        whole(run, begin(run, shards, processor))
        assert audit(run).passed
        assert len((run / "ledger.jsonl").read_bytes().splitlines()) == 7


def test_the_job_says_its_verdict_and_ends_with_a_code(
    run: Place, shards: ShardManifest, processor: tuple[ProcessorSpec, str]
) -> None:
    whole(run, begin(run, shards, processor))

    def job() -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PYTHONPATH": str(ROOT / "platform")}
        command = [sys.executable, "jobs/audit.py", str(run)]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)

    good = job()
    assert good.returncode == 0 and good.stdout.startswith("exactly once: 50 samples x 1 epoch, 7 steps, 3 attempts")
    (run / "ledger/000001-000001.1.jsonl").remove()
    bad = job()
    assert bad.returncode == 1 and "broken chain: 1\n" in bad.stdout
    assert bad.stderr.splitlines()[-1].startswith(f"error: RUN={run} did not count every sample exactly once")
