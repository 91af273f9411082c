"""The training loop: one for every tuning, stage and world size. Runs without Ray.

feed -> [atoms of step k] -> count targets on all ranks -> backward each -> step -> metrics -> checkpoint
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from rayllava.checkpoint import ledger
from rayllava.checkpoint.ledger import LedgerEntry
from rayllava.checkpoint.run import Decision, RunManifest
from rayllava.checkpoint.saver import Saver
from rayllava.checkpoint.store import Store
from rayllava.families import FAMILIES
from rayllava.model.build import initial, lay_over
from rayllava.model.forward import LossModel
from rayllava.model.seed import seed_of
from rayllava.model.tuning import census, tune
from rayllava.place import Place
from rayllava.prompt.collate import rehearsal
from rayllava.records import Batch
from rayllava.train import signals
from rayllava.train.engine import Engine
from rayllava.train.flops import Cost, Work, peak_flops
from rayllava.train.meter import Meter
from rayllava.train.optim import lr_factor
from rayllava.train.watch import Watch
from rayllava.train.watchdog import Watchdog

log = logging.getLogger(__name__)

Rejected = list[tuple[str, str]]
"""Key and reason of samples that had to be left out."""

Feed = Iterator[tuple[int, int, list[Batch], Rejected]]
"""(step, epoch, this rank's atoms, what had to be left out) from the cursor to the last step, in order."""


def run(
    manifest: RunManifest,
    decision: Decision,
    feed: Feed,
    *,
    device: torch.device,
    largest: tuple[int, int, int],
    born: float = 0.0,
) -> None:
    """Train from the decision's cursor to the end on one rank of an initialised process group.

    `largest` is the shape of the largest atom (Plan.largest), which is computed first, for nothing, so that a lack of
    memory shows at once. `born` is when this process began to work for the attempt, in seconds since 1970.
    """
    recipe = manifest.recipe
    if recipe.scale.threads:
        torch.set_num_threads(recipe.scale.threads)
    store = Store(Place(recipe.out))
    engine = _engine(manifest, decision, store, device, largest)
    world = {"rank": engine.rank, "world_size": engine.world_size}
    saver = Saver(store, attempt=decision.attempt, keep=recipe.save.keep, **world)
    with Watchdog(limit_s=recipe.scale.hang_s, **world) as watchdog:
        loop = _Loop(manifest, decision, engine, saver, watchdog, started={"worker": born, "engine": time.time()})
        loop.look(started=True)
        for step, epoch, atoms, rejected in feed:
            loop.step(step, epoch, atoms, rejected)
        assert loop.done >= manifest.num_steps, f"the feed ended after step {loop.done} of {manifest.num_steps}"
        watchdog.at(loop.done, "save")
        saver.wait()
    loop.close()


class _Loop:
    """What one rank keeps from step to step."""

    def __init__(
        self,
        manifest: RunManifest,
        decision: Decision,
        engine: Engine,
        saver: Saver,
        watchdog: Watchdog,
        *,
        started: dict[str, float],
    ) -> None:
        self.manifest = manifest
        self.recipe = manifest.recipe
        self.decision = decision
        self.engine = engine
        self.saver = saver
        self.watchdog = watchdog
        self.started = started
        self.done = self.saved = decision.cursor
        self.entries: list[LedgerEntry] = []
        self.num_rejected = 0.0
        self.waited = time.monotonic()
        self.pace = 0.0
        self.stall = self.watched = 0.0
        self.watch = Watch(manifest, engine)
        self.cost = Cost.of(engine.llava, manifest.processor)
        self.peak = peak_flops(self.recipe.scale, engine.device)
        self.meter = Meter(Place(self.recipe.out) / "metrics.jsonl") if engine.rank == 0 else None
        signals.clear()

    def step(self, step: int, epoch: int, atoms: list[Batch], rejected: Rejected) -> None:
        """Do a step, 0-based, and whatever is due after it."""
        recipe, engine = self.recipe, self.engine
        began = time.monotonic()
        # By now a save has held up the step, and before an attempt's first step there was a look.
        fed = began - self.waited - self.watched - self.stall
        self.watchdog.at(step + 1, "count")
        work = Work.of(atoms)
        targets, samples, left_out, asked, positions, tokens, pairs, images = engine.sum(
            work.targets,
            sum(len(atom.sample_ids) for atom in atoms),
            len(rejected),
            engine.rank == 0 and signals.asked(),
            sum(atom.ids.size for atom in atoms),
            work.tokens,
            work.pairs,
            work.images,
        )
        if asked:
            self._save_and_hold()
            self.waited, fed, self.watched, self.stall = time.monotonic(), 0.0, 0.0, 0.0
        self.num_rejected += left_out
        _check_rejected(rejected, self.num_rejected, self.manifest)
        if not targets:
            raise ValueError(f"step {step + 1} has no target token; check prompt.template against the data")
        self.watchdog.at(step + 1, "backward")
        losses = [
            engine.backward(
                atom,
                num_targets=int(targets),
                last=number == len(atoms),
                seed=seed_of(recipe.seed, "atom", epoch, step, atom.index),
            )
            for number, atom in enumerate(atoms, 1)
        ]
        self.watchdog.at(step + 1, "step")
        loss = engine.sum(sum(losses))[0] / targets
        if not math.isfinite(loss):
            raise ValueError(self._not_finite(step, loss, atoms, losses))
        factor = lr_factor(step, num_steps=self.manifest.num_steps, optim=recipe.optim)
        engine.step(factor)
        norm = engine.grad_norm
        if norm is not None and not math.isfinite(norm):
            raise ValueError(
                f"the gradient of step {step + 1} has norm {norm}; its weights are not saved; "
                f"lower optim.lr={recipe.optim.lr}, or set optim.clip"
            )
        self.done = step + 1
        self.entries.append(_entry(step, epoch, atoms, rejected, self.decision))
        self.look()
        now = time.monotonic()
        seconds = now - self.waited
        if self.meter:
            flops = self.cost.flops(tokens=tokens, pairs=pairs, targets=targets, images=images)
            self.meter.write(
                step=step + 1,
                epoch=epoch,
                loss=loss,
                lr=recipe.optim.lr * factor,
                grad_norm=norm,
                num_target_tokens=int(targets),
                num_samples=int(samples),
                num_rejected=int(left_out),
                num_tokens=int(tokens),
                num_positions=int(positions),
                tokens_per_second=tokens / seconds,
                mfu=None if self.peak is None else flops / (seconds * engine.world_size * self.peak),
                world_size=engine.world_size,
                attempt=self.decision.attempt,
                seconds=seconds,
                data_seconds=fed,
                save_seconds=self.stall,
                watch_seconds=self.watched,
                time=time.time(),
                **({"started": self.started | {"step": time.time() - seconds}} if self.started else {}),
            )
        self.started, self.stall, self.watched = {}, 0.0, 0.0
        self.pace = 0.9 * self.pace + 0.1 * seconds if self.pace else seconds
        signals.tell(step=self.done, num_steps=self.manifest.num_steps, step_seconds=self.pace)
        self.waited = now
        self._save_if_due()  # last, so that no kill leaves a checkpoint whose step has no line of metrics
        self.watchdog.at(self.done, "data")

    def look(self, *, started: bool = False) -> None:
        """Look at the model where that is due; `started` before an attempt's first step."""
        began = time.monotonic()
        if self.watch.due(self.done, started=started):
            self.watch.look(self.done, self.decision.attempt, beat=lambda: self.watchdog.at(self.done, "watch"))
            self.watchdog.at(self.done, "data")
            self.watched += time.monotonic() - began

    def close(self) -> None:
        if self.meter:
            self.meter.flush()
            ledger.derive(Place(self.recipe.out), self.saver.ledger)

    def _save_if_due(self) -> None:
        if self.done % self.recipe.save.every == 0 or self.done == self.manifest.num_steps:
            self._save()

    def _save(self) -> None:
        self.watchdog.at(self.done, "save")
        began = time.monotonic()
        if self.meter:
            self.meter.flush()
        self.saver.wait()  # it writes what the engine is about to fill anew
        self.saver.start(self.done, self.engine.gather(), self.entries)
        self.entries, self.saved = [], self.done
        self.stall += time.monotonic() - began

    def _save_and_hold(self) -> None:
        """Save what is not saved yet, wait until it counts, and wait to be replaced."""
        if self.saved < self.done:
            self._save()
        self.saver.wait()
        if self.engine.rank == 0:
            log.info("saved step %d for a planned change; waiting to be replaced", self.done)
        self.watchdog.at(self.done, "hold")
        signals.hold()

    def _not_finite(self, step: int, loss: float, atoms: list[Batch], losses: list[float]) -> str:
        """Return what to say about a loss that is no number; the weights have not moved. Collective."""
        pairs = zip(atoms, losses, strict=True)
        mine = [id_ for atom, one in pairs if not math.isfinite(one) for id_ in atom.sample_ids]
        all_: list[Any] = [None] * self.engine.world_size
        torch.distributed.all_gather_object(all_, mine)
        ids = [id_ for some in all_ for id_ in some]
        named = ", ".join(ids[:20]) + (", ..." if len(ids) > 20 else "")
        return (
            f"loss is {loss} at step {step + 1}, from samples {named or 'that are each finite'}; the weights are "
            f"those of step {step}; look at these samples, or lower optim.lr={self.recipe.optim.lr}"
        )


def _engine(
    manifest: RunManifest, decision: Decision, store: Store, device: torch.device, largest: tuple[int, int, int]
) -> Engine:
    recipe = manifest.recipe
    assert recipe.model is not None
    llava = initial(recipe, manifest.processor, origin=manifest.origin)
    dtype = getattr(torch, recipe.scale.dtype)
    family = FAMILIES[recipe.model.family]
    trained = tune(llava, recipe.tuning, family, seed=recipe.seed, dtype=dtype, device=device)
    folder = store.fetch(decision.checkpoint) if decision.checkpoint else None
    if folder:
        laid = lay_over(llava, folder)
        assert sorted(laid) == trained, f"{decision.checkpoint} holds {len(laid)} tensors, {len(trained)} train"
    parts = ", ".join(f"{part} {tensors} ({n:,})" for part, (tensors, n) in census(llava).items())
    engine = Engine(LossModel(llava, manifest.processor), recipe, device=device)
    rows, positions, images = largest
    engine.load(
        folder,
        step=decision.cursor,
        rehearsed=rehearsal(manifest.processor, rows=rows, positions=positions, images=images),
    )
    if engine.rank == 0:
        log.info(
            "attempt %d: tensors that train (numbers in them): %s; ZeRO-%d on %d workers, from step %d",
            decision.attempt,
            parts,
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
