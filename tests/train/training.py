"""What the ranks of test_engine.py run."""

from __future__ import annotations

from typing import Any

import numpy as np

from rayllava.checkpoint.ledger import LedgerEntry
from rayllava.checkpoint.run import Decision, write_decision
from rayllava.data.plan import Plan
from rayllava.place import Place
from rayllava.prompt.collate import collate, dummy, rehearsal
from rayllava.recipe import DataSpec, Full, ModelSpec, OptimSpec, ProcessorSpec, PromptSpec, Recipe, ScaleSpec
from rayllava.records import IGNORE, Batch, Example
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
    return collate([_example(sample, spec) for sample in samples], pad_token_id=spec.pad_token_id, index=index)


def _example(sample: int, spec: ProcessorSpec) -> Example:
    rng = np.random.default_rng(sample)
    ids = rng.integers(260, 330, size=int(rng.integers(8, 20))).astype(np.int32)
    labels = ids.copy()
    labels[: len(ids) // 2] = IGNORE
    size = spec.image_size
    pixels = np.zeros((0, 3, size, size), dtype=np.uint8)
    if sample % 3:
        run = np.full(spec.num_image_tokens, spec.image_token_id, dtype=np.int32)
        ids = np.concatenate([ids[:1], run, ids[1:]])
        labels = np.concatenate([labels[:1], np.full_like(run, IGNORE), labels[1:]])
        pixels = rng.integers(0, 256, size=(1, 3, size, size)).astype(np.uint8)
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
    import torch

    from rayllava.checkpoint.saver import Saver
    from rayllava.checkpoint.store import Store
    from rayllava.families import FAMILIES
    from rayllava.model.build import initial, lay_over
    from rayllava.model.forward import LossModel
    from rayllava.model.seed import seed_of
    from rayllava.model.tuning import tune
    from rayllava.train.engine import Engine
    from rayllava.train.optim import lr_factor

    torch.set_num_threads(1)
    model = ModelSpec(**parts)
    made = recipe(model, zero, **(changes or {}))
    llava = initial(made, SPEC)
    dtype = getattr(torch, made.scale.dtype)
    tune(llava, made.tuning, FAMILIES[model.family], seed=made.seed, dtype=dtype)
    folder = Store(Place(load)).fetch(f"step-{first:06d}") if load else None
    if folder:
        lay_over(llava, folder)
    engine = Engine(LossModel(llava, SPEC), made, device=torch.device("cpu"))
    if folder:
        engine.load(folder, step=first, rehearsed=rehearsal(SPEC, rows=4, positions=20, images=3))
    saver, entries = None, []
    if save:
        place, w = Place(save), engine.world_size
        if engine.rank == 0:
            write_decision(place, Decision(attempt=1, checkpoint=None, cursor=0, world_size=w, driver="test"))
        saver = Saver(Store(place), attempt=1, rank=engine.rank, world_size=w, keep=1)
    losses = []
    for step in range(first, steps):
        share = PLAN.share(step, engine.world_size)[engine.rank]
        atoms = [dummy(SPEC) if a is None else batch_of([int(s) for s in a.samples], a.index) for a in share]
        targets = engine.sum(sum(atom.num_targets for atom in atoms))[0]
        parts = [
            engine.backward(
                atom,
                num_targets=int(targets),
                last=number == len(atoms),
                seed=seed_of(made.seed, "atom", PLAN.epoch_of(step), step, atom.index),
            )
            for number, atom in enumerate(atoms, 1)
        ]
        engine.step(lr_factor(step, num_steps=steps, optim=made.optim))
        losses.append(engine.sum(sum(parts))[0] / targets)
        held = {atom.index: tuple(map(str, atom.samples)) for atom in share if atom is not None}
        entries.append(LedgerEntry(step + 1, PLAN.epoch_of(step), engine.world_size, 1, held))
        if saver and step + 1 == save_at:
            saver.start(step + 1, engine.gather(), entries)
            saver.wait()
    return losses


def whole_run(task: dict[str, Any]) -> list[float]:
    """Train a prepared run from its start to its end, without Ray, and return the loss of every step."""
    import torch

    from rayllava.checkpoint.lease import Lease
    from rayllava.checkpoint.run import read_run
    from rayllava.checkpoint.store import decide
    from rayllava.data import stream
    from rayllava.train import loop
    from rayllava.train.launch import stream_spec
    from rayllava.train.meter import read_metrics

    run = Place(task["run"])
    manifest = read_run(run)
    with Lease(run) as lease:
        decision = decide(run, world_size=1, driver=lease.id)
        spec = stream_spec(manifest, decision)
        largest = stream.open_plan(spec).largest()
        loop.run(manifest, decision, stream.stream(spec), device=torch.device("cpu"), largest=largest)
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


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
