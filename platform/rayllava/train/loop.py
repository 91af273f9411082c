"""The training loop: one for every tuning, stage and world size. Runs without Ray.

feed -> [atoms of step k] -> count targets on all ranks -> backward each -> step -> metrics -> checkpoint
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from rayllava.checkpoint import ledger
from rayllava.checkpoint.ledger import LedgerEntry
from rayllava.checkpoint.run import Decision, RunManifest
from rayllava.checkpoint.saver import Saver
from rayllava.checkpoint.store import Store
from rayllava.model.build import initial, lay_over
from rayllava.model.forward import LossModel
from rayllava.model.tuning import tune
from rayllava.place import Place
from rayllava.records import Batch
from rayllava.train.engine import Engine
from rayllava.train.meter import Meter
from rayllava.train.optim import lr_factor

log = logging.getLogger(__name__)

Rejected = list[tuple[str, str]]
"""Key and reason of samples that had to be left out."""

Feed = Iterator[tuple[int, int, list[Batch], Rejected]]
"""(step, epoch, this rank's atoms, what had to be left out) from the cursor to the last step, in order."""


def run(manifest: RunManifest, decision: Decision, feed: Feed, *, device: torch.device) -> None:
    """Train from the decision's cursor to the end on one rank of an initialised process group."""
    recipe = manifest.recipe
    run_dir = Path(recipe.out)
    store = Store(Place(recipe.out))
    if recipe.scale.threads:
        torch.set_num_threads(recipe.scale.threads)
    engine = _engine(manifest, decision, store, device)
    meter = Meter(run_dir / "metrics.jsonl") if engine.rank == 0 else None
    saver = Saver(
        store,
        attempt=decision.attempt,
        rank=engine.rank,
        world_size=engine.world_size,
        keep=recipe.save.keep,
    )
    entries: list[LedgerEntry] = []
    step = decision.cursor
    waited = time.monotonic()
    num_rejected = 0.0
    for step, epoch, atoms, rejected in feed:
        started = time.monotonic()
        targets, samples, left_out = engine.sum(
            sum(atom.num_targets for atom in atoms),
            sum(len(atom.sample_ids) for atom in atoms),
            len(rejected),
        )
        num_rejected += left_out
        _check_rejected(rejected, num_rejected, manifest)
        if not targets:
            raise ValueError(f"step {step + 1} has no target token; check prompt.template against the data")
        losses = [
            engine.backward(atom, num_targets=int(targets), last=index == len(atoms) - 1)
            for index, atom in enumerate(atoms)
        ]
        factor = lr_factor(step, num_steps=manifest.num_steps, optim=recipe.optim)
        engine.step(factor)
        loss = engine.sum(sum(losses))[0] / targets
        if not math.isfinite(loss):
            raise ValueError(f"loss is {loss} at step {step + 1}; lower optim.lr={recipe.optim.lr}")
        if meter:
            meter.write(
                step=step + 1,
                epoch=epoch,
                loss=loss,
                lr=recipe.optim.lr * factor,
                grad_norm=engine.grad_norm,
                num_target_tokens=int(targets),
                num_samples=int(samples),
                num_rejected=int(left_out),
                world_size=engine.world_size,
                attempt=decision.attempt,
                seconds=time.monotonic() - waited,
                data_seconds=started - waited,
            )
        entries.append(_entry(step, epoch, atoms, rejected, decision))
        waited = time.monotonic()
        if (step + 1) % recipe.save.every == 0 or step + 1 == manifest.num_steps:
            saver.start(step + 1, engine.gather(), entries)
            saver.wait()
            entries = []
            waited = time.monotonic()
    assert step + 1 >= manifest.num_steps, f"the feed ended after step {step + 1} of {manifest.num_steps}"
    if engine.rank == 0:
        ledger.derive(store.run, saver.ledger)


def _engine(manifest: RunManifest, decision: Decision, store: Store, device: torch.device) -> Engine:
    recipe = manifest.recipe
    llava = initial(recipe, manifest.processor)
    if decision.checkpoint:
        lay_over(llava, store.fetch(decision.checkpoint))
    trained = tune(llava, recipe.tuning)
    engine = Engine(LossModel(llava, manifest.processor), recipe, device=device)
    if decision.checkpoint:
        engine.load(store.fetch(decision.checkpoint), step=decision.cursor)
    if engine.rank == 0:
        log.info(
            "attempt %d: %d parameter tensors train, ZeRO-%d on %d workers, from step %d",
            decision.attempt,
            len(trained),
            recipe.scale.zero,
            engine.world_size,
            decision.cursor,
        )
    return engine


def _entry(step: int, epoch: int, atoms: list[Batch], rejected: Rejected, decision: Decision) -> LedgerEntry:
    """Return the ledger's line of this rank's atoms, which have all been through the backward pass."""
    return LedgerEntry(
        step=step + 1,
        epoch=epoch,
        world_size=decision.world_size,
        attempt=decision.attempt,
        atoms={atom.index: atom.sample_ids for atom in atoms if atom.sample_ids},
        rejected=dict(rejected),
    )


def _check_rejected(rejected: Rejected, total: float, manifest: RunManifest) -> None:
    """Name what was left out, and fail once it is more than the recipe allows."""
    for key, reason in rejected:
        log.warning("left out %s: %s", key, reason)
    data = manifest.recipe.data
    if total > data.budget * data.global_batch * manifest.num_steps:
        raise ValueError(
            f"{total:.0f} samples cannot be encoded, more than data.budget={data.budget} allows; the log names them"
        )


def worker_device(wanted: str) -> torch.device:
    """Return this worker's device: its GPU when there is one and it is wanted."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
