"""What the ranks of test_engine.py run."""

from __future__ import annotations

from typing import Any

import numpy as np

from rayllava.checkpoint.ledger import LedgerEntry
from rayllava.checkpoint.run import Decision, write_decision
from rayllava.data.plan import Plan
from rayllava.place import Place
from rayllava.prompt.collate import collate, dummy
from rayllava.recipe import DataSpec, Full, ModelSpec, OptimSpec, PromptSpec, Recipe, ScaleSpec
from rayllava.records import IGNORE, Batch, Example
from tests.tiny import processor_spec

SPEC = processor_spec()
PLAN = Plan(num_samples=97, seed=3, global_batch=20, epochs=5, atom=4, tail="short")
"""Five atoms a step, so that two ranks get three and two plus a dummy."""


def recipe(model: ModelSpec, zero: int, dtype: str = "float32") -> Recipe:
    return Recipe(
        model=model,
        prompt=PromptSpec(template="vicuna_v1", max_length=128),
        tuning=Full(),
        data=DataSpec(global_batch=20, atom=4),
        optim=OptimSpec(lr=3e-3, projector_lr=1e-2, warmup=0.1, clip=0.5),
        scale=ScaleSpec(zero=zero, dtype=dtype, device="cpu", checkpointing=False, threads=1),
        seed=5,
    )


def batch_of(samples: list[int]) -> Batch:
    """Draw each sample from its own seed: every third without a picture, lengths uneven."""
    return collate([_example(sample) for sample in samples], pad_token_id=SPEC.pad_token_id)


def _example(sample: int) -> Example:
    rng = np.random.default_rng(sample)
    ids = rng.integers(260, 330, size=int(rng.integers(8, 20))).astype(np.int32)
    labels = ids.copy()
    labels[: len(ids) // 2] = IGNORE
    pixels = np.zeros((0, 3, 28, 28), dtype=np.uint8)
    if sample % 3:
        run = np.full(SPEC.num_image_tokens, SPEC.image_token_id, dtype=np.int32)
        ids = np.concatenate([ids[:1], run, ids[1:]])
        labels = np.concatenate([labels[:1], np.full_like(run, IGNORE), labels[1:]])
        pixels = rng.integers(0, 256, size=(1, 3, 28, 28)).astype(np.uint8)
    return Example(str(sample), ids, labels, pixels)


def curve(task: dict[str, Any]) -> dict[str, list[float]]:
    """Train under each ZeRO stage of the task and return the loss of every step by stage.

    With `save`, the state after `save_at` steps goes to a run there; with `load`, training continues from a run.
    """
    return {str(zero): _curve(task, zero) for zero in task["zero"]}


def _curve(task: dict[str, Any], zero: int) -> list[float]:
    import torch

    from rayllava.checkpoint.saver import Saver
    from rayllava.checkpoint.store import Store
    from rayllava.model.build import initial, lay_over
    from rayllava.model.forward import LossModel
    from rayllava.model.tuning import tune
    from rayllava.train.engine import Engine
    from rayllava.train.optim import lr_factor

    torch.set_num_threads(1)
    made = recipe(ModelSpec(**task["model"]), zero, task.get("dtype", "float32"))
    llava = initial(made, SPEC)
    first = task.get("from", 0)
    if task.get("load"):
        lay_over(llava, Store(Place(task["load"])).fetch(f"step-{first:06d}"))
    tune(llava, made.tuning)
    engine = Engine(LossModel(llava, SPEC), made, device=torch.device("cpu"))
    if task.get("load"):
        engine.load(Store(Place(task["load"])).fetch(f"step-{first:06d}"), step=first)
    saver, entries = None, []
    if task.get("save"):
        place = Place(f"{task['save']}/zero{zero}")
        if engine.rank == 0:
            write_decision(
                place,
                Decision(attempt=1, checkpoint=None, cursor=0, world_size=engine.world_size, driver="test"),
            )
        saver = Saver(Store(place), attempt=1, rank=engine.rank, world_size=engine.world_size, keep=1)
    losses = []
    for step in range(first, task["to"]):
        share = PLAN.share(step, engine.world_size)[engine.rank]
        atoms = [dummy(SPEC) if atom is None else batch_of([int(s) for s in atom.samples]) for atom in share]
        targets = engine.sum(sum(atom.num_targets for atom in atoms))[0]
        parts = [
            engine.backward(atom, num_targets=int(targets), last=index == len(atoms) - 1)
            for index, atom in enumerate(atoms)
        ]
        engine.step(lr_factor(step, num_steps=task["of"], optim=made.optim))
        losses.append(engine.sum(sum(parts))[0] / targets)
        held = {atom.index: tuple(map(str, atom.samples)) for atom in share if atom is not None}
        entries.append(LedgerEntry(step + 1, PLAN.epoch_of(step), engine.world_size, 1, held))
        if saver and step + 1 == task["save_at"]:
            saver.start(step + 1, engine.gather(), entries)
            saver.wait()
    return losses
