"""What the ranks of test_engine.py, test_states.py and test_loop.py run."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from rayllava.checkpoint.ledger import LedgerEntry
from rayllava.checkpoint.run import Decision, read_run, write_decision
from rayllava.checkpoint.saver import Saver
from rayllava.checkpoint.store import Store, decide
from rayllava.data import stream
from rayllava.data.order import Indices
from rayllava.data.plan import Plan
from rayllava.data.shards import ShardReader
from rayllava.data.stream import Fed
from rayllava.families import FAMILIES
from rayllava.model.build import initial, lay_over, read_tensors
from rayllava.model.forward import LossModel
from rayllava.model.seed import seed_of
from rayllava.model.tuning import tune
from rayllava.place import Place
from rayllava.prompt.collate import collate, dummy, rehearsal
from rayllava.recipe import DataSpec, Full, ModelSpec, OptimSpec, ProcessorSpec, PromptSpec, Recipe, ScaleSpec
from rayllava.records import IGNORE, Batch, Example, Sample
from rayllava.train.engine import Engine
from rayllava.train.optim import lr_factor
from tests.tiny import processor_spec

SPEC = processor_spec()
PLAN = Plan(num_samples=97, seed=3, global_batch=20, epochs=5, atom=4, tail="short")
"""Five atoms a step, so that two ranks get three and two plus a dummy."""


def recipe(model: ModelSpec, zero: int, **changes: Any) -> Recipe:
    """Return a recipe for the plan above; `tuning`, `lr` and fields of `scale` may differ."""
    tuning, lr = changes.pop("tuning", Full()), changes.pop("lr", 3e-3)
    scale = {"dtype": "float32", "device": "cpu", "checkpointing": False, "threads": 1} | changes
    return Recipe(
        model=model,
        prompt=PromptSpec(template="vicuna_v1", max_length=128),
        tuning=tuning,
        data=DataSpec(global_batch=20, atom=4),
        optim=OptimSpec(lr=lr, projector_lr=1e-2, warmup=0.1, clip=0.5),
        scale=ScaleSpec(zero=zero, **scale),
        seed=5,
    )


def batch_of(samples: list[int], index: int = 0, spec: ProcessorSpec = SPEC) -> Batch:
    """Draw each sample from its own seed: every third without a picture, lengths uneven."""
    return collate([example(sample, spec) for sample in samples], pad_token_id=spec.pad_token_id, index=index)


def example(sample: int, spec: ProcessorSpec = SPEC, *, pictures: int | None = None) -> Example:
    """Draw a sample from its own seed; every third has no picture where nobody says how many."""
    pictures = min(1, sample % 3) if pictures is None else pictures
    rng = np.random.default_rng(sample)
    ids = rng.integers(260, 330, size=int(rng.integers(8, 20))).astype(np.int32)
    labels = ids.copy()
    labels[: len(ids) // 2] = IGNORE
    run = np.full(pictures * spec.num_image_tokens, spec.image_token_id, dtype=np.int32)
    ids = np.concatenate([ids[:1], run, ids[1:]])
    labels = np.concatenate([labels[:1], np.full_like(run, IGNORE), labels[1:]])
    size = spec.image_size
    pixels = rng.integers(0, 256, size=(pictures, 3, size, size)).astype(np.uint8)
    return Example(str(sample), ids, labels, pixels)


def curves(task: dict[str, Any]) -> dict[str, list[float]]:
    """Train every run of the task and return the loss of each of its steps, by name.

    With `save`, the state after `save_at` steps goes to a run there; with `load`, training continues from a run.
    `changes` are those of `recipe`.
    """
    return {name: _curve(task["model"], **run) for name, run in task["runs"].items()}


def _curve(
    parts: dict[str, Any],
    *,
    zero: int,
    steps: int,
    first: int = 0,
    save: str = "",
    save_at: int = 0,
    load: str = "",
    changes: dict[str, Any] | None = None,
) -> list[float]:
    made = recipe(ModelSpec(**parts), zero, **(changes or {}))
    engine = opened(made, load=load, first=first)
    saver, entries = None, []
    if save:
        place, w = Place(save), engine.world_size
        if engine.rank == 0:
            write_decision(place, Decision(attempt=1, checkpoint=None, cursor=0, world_size=w, driver="test"))
        saver = Saver(Store(place), attempt=1, rank=engine.rank, world_size=w, keep=1)
    losses = []
    for step in range(first, steps):
        loss, entry = advance(engine, step, num_steps=steps)
        losses.append(loss)
        entries.append(entry)
        if saver and step == first:
            engine.gather()  # the copies that the save below fills anew
        if saver and step + 1 == save_at:
            saver.start(step + 1, engine.gather(), entries)
            saver.wait()
    return losses


def opened(made: Recipe, *, load: str = "", first: int = 0) -> Engine:
    """Return the engine of a recipe on this rank, with the state that the run `load` has after `first` steps."""
    torch.set_num_threads(1)
    assert made.model is not None
    llava = initial(made, SPEC)
    dtype = getattr(torch, made.scale.dtype)
    tune(llava, made.tuning, FAMILIES[made.model.family], seed=made.seed, dtype=dtype)
    folder = Store(Place(load)).fetch(f"step-{first:06d}") if load else None
    if folder:
        lay_over(llava, folder)
    engine = Engine(LossModel(llava, SPEC), made, device=torch.device("cpu"))
    if folder:
        engine.load(folder, step=first, rehearsed=rehearsal(SPEC, rows=4, positions=20, images=3))
    return engine


def advance(engine: Engine, step: int, *, num_steps: int) -> tuple[float, LedgerEntry]:
    """Do a step of PLAN, 0-based, and return its loss and this rank's line of the ledger."""
    share = PLAN.share(step, engine.world_size)[engine.rank]
    atoms = [dummy(SPEC) if a is None else batch_of([int(s) for s in a.samples], a.index) for a in share]
    loss = descend(engine, atoms, step, factor=lr_factor(step, num_steps=num_steps, optim=engine.recipe.optim))
    held = {atom.index: tuple(map(str, atom.samples)) for atom in share if atom is not None}
    return loss, LedgerEntry(step + 1, PLAN.epoch_of(step), engine.world_size, 1, held)


def descend(engine: Engine, atoms: list[Batch], step: int, *, factor: float) -> float:
    """Do a step, 0-based, on these atoms of this rank and return its loss."""
    targets = engine.sum(sum(atom.num_targets for atom in atoms))[0]
    parts = [
        engine.backward(
            atom,
            num_targets=int(targets),
            last=number == len(atoms),
            seed=seed_of(engine.recipe.seed, "atom", PLAN.epoch_of(step), step, atom.index),
        )
        for number, atom in enumerate(atoms, 1)
    ]
    engine.step(factor)
    return engine.sum(sum(parts))[0] / targets


def states(task: dict[str, Any]) -> dict[str, Any]:
    """Return, by name of a run, digests of what this rank holds after loading it, and the loss of the next step."""
    found = {}
    for name, run in task["runs"].items():
        made = recipe(ModelSpec(**task["model"]), task["zero"], **run["changes"])
        engine = opened(made, load=run["load"], first=run["first"])
        held = {key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for key, tensor in engine.gather().items()}
        found[name] = {"held": held, "loss": advance(engine, run["first"], num_steps=run["steps"])[0]}
    return found


def mixtures(task: dict[str, Any]) -> dict[str, list[float]]:
    """Train on mixtures, a step each, under every ZeRO stage of the task; return the losses by stage.

    `given` are pairs of changes of `recipe` and the seeds of its mixtures.
    """
    found: dict[str, list[float]] = {}
    for zero in task["zeros"]:
        for changes, seeds in task["given"]:
            engine = opened(recipe(ModelSpec(**task["model"]), zero, **{"lr": 1e-3, **changes}))
            losses = [descend(engine, _dealt(engine, seed), seed, factor=1.0) for seed in seeds]
            found.setdefault(str(zero), []).extend(losses)
    return found


def _dealt(engine: Engine, seed: int) -> list[Batch]:
    """Return this rank's atoms of a random step: 4 to 8 atoms of 1 to 3 samples with 0 to 3 pictures each.

    Whatever meets in an atom, on a rank or in a step is left to chance, and so is who gets the dummies.
    """
    rng = np.random.default_rng(seed)
    kinds = [(0,), (1,), (0, 1), (2, 3), (0, 1, 2, 3)][rng.integers(5)]
    atoms = [
        collate(
            [example(int(rng.integers(1 << 30)), pictures=int(rng.choice(kinds))) for _ in range(rng.integers(1, 4))],
            pad_token_id=SPEC.pad_token_id,
            index=index,
        )
        for index in range(rng.integers(4, 9))
    ]
    places = -(-len(atoms) // engine.world_size)
    first = int(rng.integers(engine.world_size))
    mine = atoms[(engine.rank - first) % engine.world_size :: engine.world_size]
    return mine + [dummy(SPEC)] * (places - len(mine))


def whole_run(task: dict[str, Any]) -> list[float]:
    """Train a prepared run from where it is to its end, without Ray, and return the loss of every step.

    `spoil` is "drop" or "double": what happens to a sample of step 3 inside the stream.
    """
    from rayllava.checkpoint.lease import Lease
    from rayllava.train import loop
    from rayllava.train.feed import stream_spec
    from rayllava.train.meter import read_metrics

    run = Place(task["run"])
    manifest = read_run(run)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    lease = Lease(run) if rank == 0 else None
    said: list[Any] = [decide(run, world_size=world_size, driver=lease.__enter__().id) if lease else None]
    torch.distributed.broadcast_object_list(said)
    decision = said[0]
    spec = stream_spec(manifest, decision)
    largest = stream.open_plan(spec).largest()
    if how := task.get("spoil"):
        desk = stream.Desk.open(spec)
        atom = desk.plan.share(2, world_size)[rank][0]
        assert atom is not None
        desk.reader = _Spoilt(desk.reader, atom.samples, how)  # type: ignore[assignment]
    loop.run(manifest, decision, stream.stream(spec, rank=rank), device=torch.device("cpu"), largest=largest)
    if lease:
        lease.__exit__(None, None, None)
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


class _Spoilt:
    """A reader of shards that loses a sample of an atom, or reads it twice."""

    def __init__(self, reader: ShardReader, rows: Indices, how: str) -> None:
        self._reader, self._rows, self._how = reader, rows, how

    def read(self, rows: Indices) -> list[Sample]:
        samples = list(self._reader.read(rows))
        if np.array_equal(rows, self._rows):
            return samples[:-1] if self._how == "drop" else [*samples, samples[-1]]
        return samples


def poisoned(task: dict[str, Any]) -> dict[str, Any]:
    """Train three steps of a run whose third has a sample with a token that makes the loss no number.

    Return what the loop said, and whether this rank's weights are still those of the second step.
    """
    from rayllava.train import loop

    engines: list[Engine] = []

    class Kept(Engine):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            engines.append(self)

    loop.Engine = Kept  # type: ignore[misc]  # the same engine; the loop has no other way to hand it out
    run = Place(task["run"])
    manifest = read_run(run)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    decision = Decision(attempt=1, checkpoint=None, cursor=0, world_size=world_size, driver="test")
    if rank == 0:
        write_decision(run, decision)
    torch.distributed.barrier()

    def feed() -> Iterator[Fed]:
        for step in range(3):
            atom = batch_of([8 * step + 4 * rank + number for number in range(4)], rank, manifest.processor)
            if step == 2 and rank == 1:
                atom.ids[2, atom.lengths[2] - 2] = task["token"]
            yield Fed(step, 0, [atom], [])

    try:
        loop.run(manifest, decision, feed(), device=torch.device("cpu"), largest=(4, 40, 4))
    except ValueError as error:
        said = str(error)
    while Store(run).latest() is None or Store(run).latest().name != "step-000002":  # type: ignore[union-attr]
        time.sleep(0.1)
    saved = dict(read_tensors(Store(run).fetch("step-000002"), "param/"))
    held = {key.removeprefix("param/"): value for key, value in engines[0].gather().items() if "param/" in key}
    return {
        "said": said,
        "same": all(torch.equal(value, saved[name]) for name, value in held.items()),
        "num": len(held),
    }


def hang(task: dict[str, Any]) -> None:
    """Rank 0 waits in a collective of step 3 for rank 1, which never comes to it."""
    import logging
    import time

    import torch

    from rayllava.train.watchdog import Watchdog

    logging.basicConfig()
    rank = torch.distributed.get_rank()
    with Watchdog(rank=rank, world_size=2, limit_s=task["limit_s"]) as watchdog:
        watchdog.at(3, "data")
        if rank == 1:
            time.sleep(60)
        watchdog.at(3, "count")
        torch.distributed.barrier()
