"""The ranks of one attempt in one process, saving through the real store what can be told from the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rayllava.checkpoint.ledger import LedgerEntry
from rayllava.checkpoint.run import Decision
from rayllava.checkpoint.saver import Saver
from rayllava.checkpoint.store import Checkpoint, Store, decide
from rayllava.place import Place

NAMES = [f"{kind}/layer.{number}" for number in range(3) for kind in ("param", "exp_avg", "exp_avg_sq")]
NUM_ATOMS = 4


def tensors(step: int, attempt: int, names: Sequence[str] = NAMES) -> dict[str, Tensor]:
    return {
        name: torch.arange(64, dtype=torch.float32).reshape(8, 8) + step * 1000 + attempt + NAMES.index(name) / 16
        for name in names
    }


def entries(first: int, last: int, *, decision: Decision, rank: int) -> list[LedgerEntry]:
    """Return what a rank computes of steps `first` to `last`: every W-th of the atoms, two samples each."""
    return [
        LedgerEntry(
            step=step,
            epoch=0,
            world_size=decision.world_size,
            attempt=decision.attempt,
            atoms={n: (f"a:{step}.{n}", f"a:{step}.{n}#1") for n in range(rank, NUM_ATOMS, decision.world_size)},
        )
        for step in range(first, last + 1)
    ]


class Group:
    """Decides an attempt and saves its checkpoints on all ranks."""

    def __init__(self, run: Place, driver: str, *, world_size: int = 1, **words: Any) -> None:
        self.decision = decide(run, world_size=world_size, driver=driver)
        self.done = self.decision.cursor
        words = {"keep": 10, "patience_s": 10.0} | words
        self.savers = [
            Saver(Store(run), attempt=self.decision.attempt, rank=rank, world_size=world_size, **words)
            for rank in range(world_size)
        ]

    def start(self, step: int, ranks: Sequence[int] | None = None) -> None:
        for rank in range(len(self.savers)) if ranks is None else ranks:
            share = tensors(step, self.decision.attempt, NAMES[rank :: len(self.savers)])
            lines = entries(self.done + 1, step, decision=self.decision, rank=rank)
            self.savers[rank].start(step, share, lines)

    def save(self, step: int) -> None:
        self.start(step)
        for saver in reversed(self.savers):  # rank 0 would wait for the part of one that failed
            saver.wait()
        self.done = step


def check_content(store: Store, found: Checkpoint) -> None:
    """Read a checkpoint as training does and compare every value with what was saved."""
    folder = store.fetch(found.name)
    read: dict[str, Tensor] = {}
    for name in found.manifest.files:
        read |= load_file(folder / name)
    wanted = tensors(found.manifest.step, found.manifest.attempt)
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], wanted[name]) for name in wanted), f"{found.name} is silently wrong"
