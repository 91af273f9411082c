"""The laws of the step plan."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from benchmarks.samples import draw
from rayllava.data.order import permutation
from rayllava.data.plan import GROUP, WINDOW, Atom, Group, Plan, Tail, packed


def plans() -> list[Plan]:
    """Every shape of a small run: one sample, less than a step, exact, one over, three steps."""
    made = []
    for global_batch, atom in [(1, 1), (4, 1), (6, 4), (8, 8), (12, 5)]:
        for num_samples in range(1, 3 * global_batch + 1):
            for tail in get_args(Tail):
                if tail == "drop" and num_samples < global_batch:
                    continue
                made.append(
                    Plan(
                        num_samples,
                        np.arange(num_samples) % 7 + 1,
                        seed=num_samples,
                        global_batch=global_batch,
                        epochs=2,
                        atom=atom,
                        tail=tail,
                        group_rows=odd_groups(num_samples),
                        window=3,
                    )
                )
    return made


def odd_groups(num_samples: int) -> np.ndarray:
    """Row groups of 1, 2, 3, 1, 2, 3, ... rows."""
    sizes: list[int] = []
    while sum(sizes) < num_samples:
        sizes.append(min(len(sizes) % 3 + 1, num_samples - sum(sizes)))
    return np.array(sizes, np.int64)


def epochs(plan: Plan) -> list[np.ndarray]:
    steps = [plan.step(k) for k in range(plan.num_steps)]
    return [np.concatenate([s.samples for s in steps if s.epoch == epoch]) for epoch in range(plan.epochs)]


def dealt(plan: Plan, k: int, num_workers: int) -> list[Atom]:
    return [atom for hand in plan.share(k, num_workers) for atom in hand if atom is not None]


def test_every_sample_comes_exactly_once_an_epoch() -> None:
    for plan in plans():
        for samples in epochs(plan):
            if plan.tail == "short":
                assert sorted(samples) == list(range(plan.num_samples))
            elif plan.tail == "drop":
                assert len(set(samples)) == len(samples) == plan.steps_per_epoch * plan.global_batch
            else:
                assert set(samples) == set(range(plan.num_samples))
                start = samples[: len(samples) - plan.num_samples]
                assert list(samples[plan.num_samples :]) == list(np.resize(samples[: plan.num_samples], len(start)))


def test_every_step_but_a_short_last_one_holds_the_global_batch() -> None:
    for plan in plans():
        sizes = [len(plan.step(k).samples) for k in range(plan.num_steps)]
        rest = plan.num_samples % plan.global_batch
        whole = [plan.global_batch] * (plan.num_samples // plan.global_batch)
        last = {"short": [rest], "drop": [], "repeat": [plan.global_batch]}[plan.tail] if rest else []
        assert sizes == (whole + last) * plan.epochs


def test_atoms_cut_the_step_in_order() -> None:
    for plan in plans():
        for k in range(plan.num_steps):
            atoms = plan.atoms(k)
            assert [atom.index for atom in atoms] == list(range(len(atoms)))
            assert np.array_equal(np.concatenate([a.samples for a in atoms]), plan.step(k).samples)
            assert all(1 <= len(atom.samples) <= plan.atom for atom in atoms)


def test_any_number_of_workers_gets_the_same_atoms() -> None:
    for plan in plans():
        for k, num_workers in itertools.product(range(plan.num_steps), range(1, plan.max_workers + 1)):
            atoms = {atom.index: atom.samples.tolist() for atom in dealt(plan, k, num_workers)}
            assert atoms == {atom.index: atom.samples.tolist() for atom in plan.atoms(k)}
            assert len(dealt(plan, k, num_workers)) == len(atoms)


def test_every_rank_gets_as_many_entries_and_dummies_only_at_the_end() -> None:
    for plan in plans():
        for k, num_workers in itertools.product(range(plan.num_steps), range(1, plan.max_workers + 1)):
            hands = plan.share(k, num_workers)
            assert len(hands) == num_workers
            assert {len(hand) for hand in hands} == {-(-len(plan.atoms(k)) // num_workers)}
            for hand in hands:
                real = [atom for atom in hand if atom is not None]
                assert hand[: len(real)] == real


def test_a_jump_finds_what_a_walk_finds() -> None:
    for plan in plans():
        walked = [plan.step(k).samples.tolist() for k in range(plan.num_steps)]
        for k in reversed(range(plan.num_steps)):
            assert plan.step(k).samples.tolist() == walked[k]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, global_batch: int = 10) -> list[list[int]]:
        plan = Plan(100, seed=seed, global_batch=global_batch, epochs=2, atom=2)
        return [samples.tolist() for samples in epochs(plan)]

    assert order(1) == order(1)
    assert order(1) == order(1, global_batch=25)
    assert order(1) != order(2)
    assert order(1)[0] != order(1)[1]


def test_the_permutation_never_changes() -> None:
    assert permutation(10, 42, 0).tolist() == GOLDEN
    assert permutation(10, 42, 0, 0).tolist() != GOLDEN
    assert sorted(permutation(1000, -5)) == list(range(1000))


GOLDEN = [7, 5, 9, 1, 4, 2, 6, 0, 3, 8]


def test_rows_of_a_group_are_read_within_one_window() -> None:
    plan = Plan(GROUP * 100, seed=3, global_batch=32, atom=8)
    order = plan.order(0).rows(0, plan.num_samples)
    for start in range(0, plan.num_samples, GROUP * WINDOW):
        stop = start + GROUP * WINDOW
        assert len(set(order[start:stop] // GROUP)) == min(WINDOW, 100 - start // GROUP)


def test_the_shuffle_reaches_over_all_shards() -> None:
    plan = Plan(100_000, seed=3, global_batch=1000, atom=100)
    means = np.array([plan.step(k).samples.mean() for k in range(plan.num_steps)])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4
    assert np.abs(np.diff(plan.step(0).samples)).mean() > 10_000


def test_long_atoms_are_dealt_first() -> None:
    lengths = np.ones(8, np.int64)
    plan = Plan(8, lengths, seed=0, global_batch=8, atom=1)
    lengths[plan.step(0).samples] = [1, 9, 1, 5, 4, 1, 1, 2]
    first, second = ([atom.cost for atom in hand if atom] for hand in plan.share(0, 2))
    assert (first, second) == ([9, 2, 1, 1], [5, 4, 1, 1])


def test_cost_counts_the_padding() -> None:
    plan = Plan(3, np.array([5, 1, 1]), seed=0, global_batch=3, atom=3)
    assert plan.atoms(0)[0].cost == 15


def test_more_workers_than_atoms_names_the_number_that_fits() -> None:
    plan = Plan(100, seed=0, global_batch=16, atom=4)
    with pytest.raises(ValueError, match=r"scale.workers=8 is more than the 4 atoms .* at most 4, or lower"):
        plan.share(0, 8)
    assert plan.max_workers == 4


def test_a_short_tail_is_filled_with_dummies() -> None:
    plan = Plan(17, seed=0, global_batch=16, atom=4)
    assert [[atom is None for atom in hand] for hand in plan.share(1, 4)] == [[False], [True], [True], [True]]


def test_a_plan_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.tail=drop leaves no step: 3 samples .* data.global_batch=4"):
        Plan(3, seed=0, global_batch=4, atom=1, tail="drop")
    with pytest.raises(ValueError, match="no sample"):
        Plan(0, seed=0, global_batch=4, atom=1)


def test_ten_million_samples_open_and_jump_at_once(tmp_path: Path) -> None:
    num = 10_000_000
    lengths = np.lib.format.open_memmap(tmp_path / "lengths.npy", "w+", np.uint16, (num,))
    images = np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint16, (num,))
    lengths[:] = np.arange(num) % 1000 + 30
    images[::3] = 1
    group_rows = np.full(num // 32, 32)
    words = {"seed": 1, "global_batch": 128, "epochs": 3, "atom": 16, "group_rows": group_rows, "max_length": 2048}
    for group, max_tokens in itertools.product(get_args(Group), (None, 4096)):
        tracemalloc.start()
        started = time.perf_counter()
        plan = Plan(num, lengths, images=images, group=group, max_tokens=max_tokens, **words)  # type: ignore[arg-type]
        assert len(plan.step(plan.num_steps // 2).samples) == 128
        assert len(plan.share(plan.num_steps - 1, 8)) == 8
        seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert seconds < 3, f"{seconds:.1f} s with group={group}, max_tokens={max_tokens}"
        assert peak < 40e6, f"{peak / 1e6:.0f} MB with group={group}, max_tokens={max_tokens}"


# -- what is computed for nothing -------------------------------------------------------------------------


@pytest.mark.parametrize("words", [{"max_tokens": 2048}, {"max_tokens": 4096}, {"group": "length"}], ids=str)
@pytest.mark.parametrize(("num_workers", "least"), [(1, 0.93), (8, 0.90)])
def test_ranks_compute_little_but_samples_whose_lengths_are_like_llavas(
    words: dict[str, Any], num_workers: int, least: float
) -> None:
    lengths, images = draw(20_000)
    plan = Plan(20_000, lengths, seed=0, global_batch=128, atom=16, images=images, max_length=2048, **words)
    hands = [plan.share(k, num_workers) for k in range(plan.num_steps)]
    slowest = [max(sum(atom.cost if atom else 2 for atom in hand) for hand in step) for step in hands]
    assert lengths.sum() / (num_workers * sum(slowest)) >= least


# -- packing -----------------------------------------------------------------------------------------------


def packing(num_samples: int = 500, **changes: object) -> Plan:
    lengths = np.random.default_rng(0).integers(10, 200, num_samples)
    words = {"seed": 1, "global_batch": 64, "atom": 64, "max_tokens": 256, "max_length": 128} | changes
    return Plan(num_samples, lengths, **words)  # type: ignore[arg-type]


def test_packed_atoms_hold_what_the_limit_has_room_for() -> None:
    plan = packing()
    assert plan.lengths is not None
    for k in range(plan.num_steps):
        atoms = plan.atoms(k)
        assert sorted(np.concatenate([a.samples for a in atoms])) == sorted(plan.step(k).samples)
        for atom in atoms:
            assert atom.cost == np.minimum(plan.lengths[atom.samples], 128).sum() <= 256
        least = sum(atom.cost for atom in atoms) / 256
        assert len(atoms) <= 1.25 * least + 1


def test_packing_is_first_fit_with_the_longest_first() -> None:
    assert [bin_.tolist() for bin_ in packed(np.array([2, 6, 3, 5, 4, 1]), 8)] == [[1, 0], [3, 2], [4, 5]]
    assert [bin_.tolist() for bin_ in packed(np.array([5, 5, 5]), 9)] == [[0], [1], [2]]
    with pytest.raises(AssertionError, match="an example of 10 positions for rows of 9"):
        packed(np.array([1, 10]), 9)


def test_packed_atoms_of_an_average_step_limit_the_workers() -> None:
    plan = packing()
    assert plan.lengths is not None
    fit = -(-64 * np.minimum(plan.lengths, 128).sum() // (500 * 256))
    assert plan.max_workers == fit and len(plan.share(0, plan.max_workers)) == fit
    said = rf"scale.workers=99 is more than the {fit} atoms of a step; use at most {fit}, or lower data.max_tokens"
    with pytest.raises(ValueError, match=said):
        plan.share(0, 99)


def test_grouping_and_packing_say_what_they_miss() -> None:
    words = {"seed": 0, "global_batch": 2, "atom": 2}
    with pytest.raises(AssertionError, match=r"data.group=length needs lengths and images"):
        Plan(4, np.ones(4, int), group="length", **words)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=r"data.max_tokens=9 needs the exact length of every sample"):
        Plan(4, max_tokens=9, max_length=8, **words)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=r"max_length=10 for max_tokens=9"):
        Plan(4, np.ones(4, int), max_tokens=9, max_length=10, **words)  # type: ignore[arg-type]
