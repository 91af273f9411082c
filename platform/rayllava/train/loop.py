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

from rayllava.checkpoint.store import Decision, RunManifest, Store
from rayllava.model.build import initial, lay_over
from rayllava.model.forward import LossModel
from rayllava.model.tuning import tune
from rayllava.records import Batch
from rayllava.train.engine import Engine
from rayllava.train.meter import Meter
from rayllava.train.optim import lr_factor

log = logging.getLogger(__name__)

Feed = Iterator[tuple[int, int, list[Batch], list[str]]]
"""(step, epoch, this rank's atoms, what had to be left out) from the cursor to the last step, in order."""


def run(manifest: RunManifest, decision: Decision, feed: Feed, *, device: torch.device) -> None:
    """Train from the decision's cursor to the end on one rank of an initialised process group."""
    recipe = manifest.recipe
    run_dir = Path(recipe.out)
    store = Store(run_dir)
    if recipe.scale.threads:
        torch.set_num_threads(recipe.scale.threads)
    engine = _engine(manifest, decision, store, device)
    meter = Meter(run_dir / "metrics.jsonl") if engine.rank == 0 else None
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
        waited = time.monotonic()
        if (step + 1) % recipe.save.every == 0 or step + 1 == manifest.num_steps:
            _save(engine, store, step + 1, decision, keep=recipe.save.keep)
            waited = time.monotonic()
    assert step + 1 >= manifest.num_steps, f"the feed ended after step {step + 1} of {manifest.num_steps}"


def _engine(manifest: RunManifest, decision: Decision, store: Store, device: torch.device) -> Engine:
    recipe = manifest.recipe
    llava = initial(recipe, manifest.processor)
    if decision.checkpoint:
        lay_over(llava, store.path(decision.checkpoint))
    trained = tune(llava, recipe.tuning)
    engine = Engine(LossModel(llava, manifest.processor), recipe, device=device)
    if decision.checkpoint:
        engine.load(store.path(decision.checkpoint), step=decision.cursor)
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


def _save(engine: Engine, store: Store, step: int, decision: Decision, *, keep: int) -> None:
    """Save on all ranks, then commit on rank 0 once every file is durable."""
    started = time.monotonic()
    files = engine.save(store.partial(step, decision.attempt))
    gathered: list[dict[str, str]] = [{} for _ in range(engine.world_size)]
    torch.distributed.all_gather_object(gathered, files)
    if engine.rank == 0:
        merged = {name: digest for part in gathered for name, digest in part.items()}
        folder = store.commit(step, attempt=decision.attempt, world_size=engine.world_size, files=merged, keep=keep)
        log.info("saved step %d in %.1f s to %s", step, time.monotonic() - started, folder)
    torch.distributed.barrier()


def _check_rejected(rejected: list[str], total: float, manifest: RunManifest) -> None:
    """Name what was left out, and fail once it is more than the recipe allows."""
    for line in rejected:
        log.warning("left out %s", line)
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
