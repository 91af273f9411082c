"""How far an order carries samples, and what grouping makes of a window of it."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from rayllava.data.order import Order, permutation
from rayllava.data.plan import Group, Plan, Tail

N, STEP = 100_000, 128


def mixture(num_samples: int, *, pictured: float = 0.6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return lengths and pictures as LLaVA's mixture has them: long answers are rare, a picture takes 576."""
    rng = np.random.default_rng(seed)
    images = (rng.random(num_samples) < pictured).astype(np.uint16)
    text = rng.lognormal(4.5, 0.8, num_samples).clip(10, 1400)
    return (text + 576 * images).astype(np.uint16), images


def grouped_plan(num_samples: int, *, pictured: float = 0.6, group: Group = "length", **changes: object) -> Plan:
    lengths, images = mixture(num_samples, pictured=pictured)
    words = {"seed": 4, "global_batch": 8, "atom": 3, "group_window": 4, "epochs": 2} | changes
    return Plan(num_samples, lengths, images=images, group=group, **words)  # type: ignore[arg-type]


# -- spread ------------------------------------------------------------------------------------------------


def distance(place: np.ndarray) -> float:
    """Return how far apart neighbours of the source stand on average, as a share of the epoch."""
    return float(np.abs(np.diff(place)).mean() / len(place))


def test_neighbours_of_the_source_end_up_as_far_apart_as_chance_puts_them() -> None:
    order = Plan(N, seed=42, global_batch=STEP, atom=16).order(0).rows(0, N)
    stored = permutation(N, 7)  # what jobs/shard.py does: row r holds record stored[r]
    assert distance(np.argsort(stored[order])) == pytest.approx(1 / 3, rel=0.01)
    assert distance(np.argsort(order)) == pytest.approx(1 / 45, rel=0.05)  # the plan alone, as Order owns up


def test_few_pairs_of_a_step_meet_again() -> None:
    plan = Plan(N, seed=42, global_batch=STEP, atom=16, epochs=2)
    step_of = np.empty((2, N), np.int64)
    for k in range(plan.num_steps):
        step_of[plan.epoch_of(k), plan.step(k).samples] = k
    pairs = both = 0
    for k in range(plan.steps_per_epoch):
        samples = plan.step(k).samples
        same = np.bincount(step_of[1, samples] - plan.steps_per_epoch)
        pairs += len(samples) * (len(samples) - 1) // 2
        both += int((same * (same - 1) // 2).sum())
    by_chance = (STEP - 1) / (N - 1)
    assert both / pairs == pytest.approx(6.7 * by_chance, rel=0.1)


def test_orders_of_epochs_and_seeds_have_nothing_in_common() -> None:
    sizes = np.full(N // 32, 32)
    orders = [Order(sizes, window=16, seed=seed, epoch=epoch).rows(0, N) for seed, epoch in [(1, 0), (1, 1), (2, 0)]]
    for one, other in zip(orders, orders[1:] + orders[:1], strict=True):
        assert (one == other).mean() < 0.001
        assert abs(np.corrcoef(np.argsort(one), np.argsort(other))[0, 1]) < 0.05


# -- grouping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["modality", "length"])
@pytest.mark.parametrize("pictured", [0.0, 0.5, 1.0])
def test_any_number_of_samples_makes_its_steps(group: Group, pictured: float) -> None:
    for num_samples in range(1, 3 * 8 + 1):
        for tail in get_args(Tail):
            if tail == "drop" and num_samples < 8:
                continue
            plan = grouped_plan(num_samples, pictured=pictured, group=group, tail=tail, group_window=2)
            plain = grouped_plan(num_samples, pictured=pictured, group="none", tail=tail)
            assert plan.num_steps == plain.num_steps
            for epoch in range(2):
                ks = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
                assert [len(plan.step(k).samples) for k in ks] == [len(plain.step(k).samples) for k in ks]
                ours, theirs = (np.concatenate([p.step(k).samples for k in ks]) for p in (plan, plain))
                assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize("group", ["modality", "length"])
@pytest.mark.parametrize("num_samples", [203, 208, 250, 256])
def test_a_window_keeps_its_samples_and_mixes_one_step_at_most(group: Group, num_samples: int) -> None:
    plan, plain = (grouped_plan(num_samples, group=g) for g in (group, "none"))
    assert plan.images is not None
    for epoch in range(plan.epochs):
        for first in range(0, plan.steps_per_epoch, plan.group_window):
            window = range(first, min(first + plan.group_window, plan.steps_per_epoch))
            ks = [epoch * plan.steps_per_epoch + within for within in window]
            ours, theirs = ([p.step(k).samples for k in ks] for p in (plan, plain))
            assert sorted(np.concatenate(ours)) == sorted(np.concatenate(theirs))
            assert sum(len(set(plan.images[step] > 0)) > 1 for step in ours) <= 1


def test_steps_begin_with_their_longest() -> None:
    plan = grouped_plan(250, group="modality")
    assert plan.lengths is not None
    for k in range(plan.num_steps):
        assert (np.diff(plan.lengths[plan.step(k).samples].astype(int)) <= 0).all()


def padding(plan: Plan) -> float:
    """Return the share of positions that are padding."""
    assert plan.lengths is not None
    atoms = [atom for k in range(plan.steps_per_epoch) for atom in plan.atoms(k)]
    return 1 - sum(int(plan.lengths[a.samples].sum()) for a in atoms) / sum(a.cost for a in atoms)


def test_grouping_takes_the_padding_away() -> None:
    none, modality, length = (padding(large(group)) for group in get_args(Group))
    assert modality < none / 3, f"{modality:.1%} of {none:.1%}"
    assert length < none / 20, f"{length:.1%} of {none:.1%}"


def large(group: Group) -> Plan:
    return grouped_plan(20_000, group=group, global_batch=128, atom=16, group_window=50)


def test_steps_of_like_lengths_are_what_length_adds() -> None:
    def spread(plan: Plan) -> float:
        assert plan.lengths is not None
        return float(np.mean([plan.lengths[plan.step(k).samples].std() for k in range(plan.steps_per_epoch)]))

    assert spread(large("length")) < spread(large("modality")) / 4


def test_the_turns_of_grouped_steps_are_a_draw() -> None:
    plan = large("length")
    assert plan.lengths is not None
    means = [plan.lengths[plan.step(k).samples].mean() for k in range(plan.steps_per_epoch)]
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.3
    again = [plan.lengths[plan.step(plan.steps_per_epoch + k).samples].mean() for k in range(len(means))]
    assert abs(np.corrcoef(means, again)[0, 1]) < 0.3
