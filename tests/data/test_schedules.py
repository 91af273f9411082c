"""Kill it when you like, resize it as you like: the samples that were learned from are the same, each as often."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pytest

from rayllava.data.plan import Group, Plan, Tail

SCHEDULES = 1200
MOST_WORKERS = 7


@dataclass(frozen=True)
class Run:
    """A small run, drawn at random; every attempt opens a plan of its own, as every process does."""

    num_samples: int
    lengths: np.ndarray
    words: dict[str, Any]

    @classmethod
    def draw(cls, rng: random.Random) -> Run:
        global_batch = rng.randint(1, 16)
        tail = rng.choice(get_args(Tail))
        num_samples = rng.randint(global_batch if tail == "drop" else 1, 8 * global_batch)
        draw = np.random.default_rng(rng.getrandbits(32))
        max_tokens = rng.choice([None, None, rng.randint(24, 60)])
        words = {
            "images": (draw.random(num_samples) < rng.choice([0.0, 0.5, 1.0])).astype(np.uint16),
            "group_rows": draw.multinomial(num_samples, np.ones(5) / 5),
            "window": rng.randint(1, 4),
            "seed": rng.getrandbits(31),
            "global_batch": global_batch,
            "epochs": rng.randint(1, 3),
            "atom": rng.randint(1, min(4, global_batch)),
            "tail": tail,
            "group": rng.choice(get_args(Group)),
            "group_window": rng.randint(1, 4),
            "max_tokens": max_tokens,
            "max_length": 24,
        }
        return cls(num_samples, draw.integers(1, 40, num_samples), words)

    def open(self) -> Plan:
        return Plan(self.num_samples, self.lengths, **self.words)


Work = dict[int, tuple[int, ...]]
"""The samples of each atom of a step."""


def undisturbed(plan: Plan) -> list[Work]:
    return [done(plan.share(k, 1)) for k in range(plan.num_steps)]


def disturbed(run: Run, rng: random.Random) -> tuple[list[Work], int]:
    """Return what was committed, and the number of attempts that took; every attempt has its own workers."""
    committed: list[Work] = []
    attempts = 0
    save_every = rng.randint(1, 4)
    num_steps = run.open().num_steps
    while len(committed) < num_steps:
        attempts += 1
        plan = run.open()
        cursor = len(committed)
        num_workers = rng.randint(1, min(MOST_WORKERS, plan.max_workers))
        killed_at = rng.randint(cursor, num_steps) if attempts < 6 else num_steps
        pending: list[Work] = []
        for k in range(cursor, killed_at):
            hands = plan.share(k, num_workers)
            assert len(hands) == num_workers and len({len(hand) for hand in hands}) == 1
            pending.append(done(hands))
            if (k + 1) % save_every == 0 or k + 1 == num_steps:
                committed += pending
                pending = []
    return committed, attempts


def done(hands: list[list[Any]]) -> Work:
    atoms = [atom for hand in hands for atom in hand if atom is not None]
    work = {atom.index: tuple(atom.samples.tolist()) for atom in atoms}
    assert len(work) == len(atoms), "an atom was dealt twice"
    return work


def declared(plan: Plan, epoch: int) -> Counter[int]:
    """Return how often an epoch promises each sample, told apart from the order alone."""
    order = plan.order(epoch).rows(0, plan.num_samples).tolist()
    size = plan.steps_per_epoch * plan.global_batch
    if plan.tail == "short":
        return Counter(order)
    return Counter((order * (size // len(order) + 1))[:size])


def test_no_kill_and_no_resize_loses_doubles_or_moves_a_sample() -> None:
    rng = random.Random(0)
    attempts: list[int] = []
    for _ in range(SCHEDULES):
        run = Run.draw(rng)
        plan = run.open()
        want = undisturbed(plan)
        got, taken = disturbed(run, rng)
        assert got == want, run
        for epoch in range(plan.epochs):
            steps = got[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
            learned = Counter(sample for work in steps for atom in work.values() for sample in atom)
            assert learned == declared(plan, epoch), run
        attempts.append(taken)
    assert np.mean(attempts) > 2, "kills that never come prove nothing"


@pytest.mark.parametrize("group", get_args(Group))
@pytest.mark.parametrize("max_tokens", [None, 30])
def test_a_jump_into_a_window_finds_what_a_walk_finds(group: Group, max_tokens: int | None) -> None:
    lengths = np.arange(100) % 23 + 1
    words: dict[str, Any] = {"seed": 3, "global_batch": 8, "epochs": 2, "atom": 3, "group": group, "group_window": 3}

    def opened() -> Plan:
        return Plan(100, lengths, images=np.arange(100) % 2, max_tokens=max_tokens, max_length=24, **words)

    walked = undisturbed(opened())
    for k in random.Random(1).sample(range(len(walked)), len(walked)):
        assert done(opened().share(k, 1)) == walked[k]
