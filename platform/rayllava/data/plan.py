"""Which samples step k computes: a pure function of the shards, the seed and the recipe, and of nothing else.

order(epoch)   row groups shuffled, then rows shuffled inside windows of a few row groups
step(k)        the next `global_batch` samples of the order
atoms(k)       runs of at most `atom` samples of the step
share(k, W)    whole atoms dealt to W ranks by cost; None is a dummy that keeps the ranks in step
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rayllava.data.shards import ShardManifest
    from rayllava.recipe import DataSpec

Tail = Literal["short", "drop", "repeat"]
Indices = NDArray[np.int64]

GROUP = 32
"""Rows stored together when nothing else is said."""
WINDOW = 16
"""Row groups whose rows are mixed."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One optimizer step."""

    index: int
    """0-based over the whole run."""
    epoch: int
    """0-based."""
    samples: Indices
    """Row numbers in the shards, in the order they are computed."""


@dataclass(frozen=True, slots=True, eq=False)
class Atom:
    """A canonical microbatch: what one forward pass computes at any number of workers."""

    index: int
    """0-based within its step."""
    samples: Indices
    cost: int
    """Rows times the longest of them, in the units of the plan's lengths."""


class Plan:
    """The steps of a run."""

    def __init__(
        self,
        num_samples: int,
        lengths: NDArray[np.integer] | None = None,
        *,
        seed: int,
        global_batch: int,
        epochs: int = 1,
        atom: int,
        tail: Tail = "short",
        group_rows: Indices | None = None,
        window: int = WINDOW,
    ) -> None:
        """Plan over `num_samples` rows.

        `lengths` estimates each row's positions and moves nothing but the dealing to ranks. `group_rows`
        holds the rows of each stored row group in order; without it rows are taken to be stored by 32.
        """
        if num_samples < 1:
            raise ValueError("data.shards holds no sample; there is nothing to train on")
        if tail == "drop" and num_samples < global_batch:
            raise ValueError(
                f"data.tail=drop leaves no step: {num_samples} samples do not fill "
                f"data.global_batch={global_batch}; lower it or use data.tail=short"
            )
        if group_rows is None:
            group_rows = _even_groups(num_samples)
        assert int(group_rows.sum()) == num_samples, f"{group_rows.sum()} grouped rows of {num_samples}"
        assert lengths is None or len(lengths) == num_samples, "a length for every sample"
        self.num_samples = num_samples
        self.lengths = lengths
        self.seed = seed
        self.global_batch = global_batch
        self.epochs = epochs
        self.atom = atom
        self.tail = tail
        self.window = window
        whole, rest = divmod(num_samples, global_batch)
        self.steps_per_epoch = whole + (1 if rest and tail != "drop" else 0)
        self._group_rows = group_rows
        self._orders: dict[int, Order] = {}

    @classmethod
    def of(cls, shards: ShardManifest, data: DataSpec, *, seed: int, num_image_tokens: int = 576) -> Self:
        """Plan over a shard folder.

        `num_image_tokens` weighs pictures against text when atoms are dealt; it changes no atom.
        """
        return cls(
            shards.num_samples,
            shards.lengths(num_image_tokens),
            seed=seed,
            global_batch=data.global_batch,
            epochs=data.epochs,
            atom=data.atom,
            tail=data.tail,
            group_rows=shards.group_rows,
        )

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def max_workers(self) -> int:
        """Atoms of a full step: more workers than these could not all have work."""
        return -(-self.global_batch // self.atom)

    def epoch_of(self, k: int) -> int:
        return k // self.steps_per_epoch

    def step(self, k: int) -> Step:
        """Return step `k`, 0-based; any step costs the same, wherever the walk was before."""
        assert 0 <= k < self.num_steps, f"step {k} of {self.num_steps}"
        epoch, within = divmod(k, self.steps_per_epoch)
        order = self.order(epoch)
        start = within * self.global_batch
        stop = min(start + self.global_batch, self.num_samples)
        parts = [order.rows(start, stop)]
        missing = self.global_batch - (stop - start) if self.tail == "repeat" else 0
        while missing:
            again = min(missing, self.num_samples)
            parts.append(order.rows(0, again))
            missing -= again
        return Step(index=k, epoch=epoch, samples=np.concatenate(parts))

    def atoms(self, k: int) -> list[Atom]:
        """Return the microbatches of step `k`."""
        samples = self.step(k).samples
        cuts = range(0, len(samples), self.atom)
        return [self._atom(index, samples[cut : cut + self.atom]) for index, cut in enumerate(cuts)]

    def share(self, k: int, num_workers: int) -> list[list[Atom | None]]:
        """Deal the atoms of step `k` to the ranks, as many entries to each.

        Longest first to the rank with the least work that has a place left. Each rank's list begins with its
        longest atom, so ranks that compute in lockstep compute atoms of like cost together.
        """
        self.check_workers(num_workers)
        atoms = sorted(self.atoms(k), key=lambda atom: (-atom.cost, atom.index))
        places = -(-len(atoms) // num_workers)
        hands: list[list[Atom | None]] = [[] for _ in range(num_workers)]
        loads = [0] * num_workers
        for atom in atoms:
            open_ranks = (rank for rank in range(num_workers) if len(hands[rank]) < places)
            rank = min(open_ranks, key=lambda rank: (loads[rank], rank))
            hands[rank].append(atom)
            loads[rank] += atom.cost
        return [hand + [None] * (places - len(hand)) for hand in hands]

    def check_workers(self, num_workers: int) -> None:
        """Raise ValueError when a full step has fewer atoms than there are workers."""
        assert num_workers >= 1, f"{num_workers} workers"
        fit = self.max_workers
        if num_workers > fit:
            cure = ", or lower data.atom" if self.atom > 1 else ", or raise data.global_batch"
            raise ValueError(
                f"scale.workers={num_workers} is more than the {fit} atom{'s' * (fit > 1)} of a step; "
                f"use at most {fit}{cure}"
            )

    def order(self, epoch: int) -> Order:
        """Return the order of an epoch; the last two stay in memory."""
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = Order(self._group_rows, window=self.window, seed=self.seed, epoch=epoch)
        return self._orders[epoch]

    def _atom(self, index: int, samples: Indices) -> Atom:
        longest = 1 if self.lengths is None else int(self.lengths[samples].max())
        return Atom(index=index, samples=samples, cost=len(samples) * longest)


class Order:
    """A permutation of all rows with random access.

    Row groups are permuted as a whole, over all shards; rows only inside a window of consecutive permuted
    groups. A reader that keeps one window of groups therefore reads every group once. The price: rows of one
    group always meet within a window. `jobs/shard.py` shuffles all records before it cuts, so a group is
    itself a random draw and the meeting means nothing. Memory is a few numbers a row group plus one window.
    """

    def __init__(self, group_rows: Indices, *, window: int, seed: int, epoch: int) -> None:
        self._words = (seed, epoch)
        self._window = window
        permuted = permutation(len(group_rows), *self._words)
        self._rows = group_rows[permuted]
        self._starts = (np.cumsum(group_rows) - group_rows)[permuted]
        ends = np.cumsum(self._rows)
        self._window_ends = np.append(ends[window - 1 : -1 : window], ends[-1])

    def rows(self, start: int, stop: int) -> Indices:
        """Return the rows at positions `start` to `stop` of the order."""
        return np.concatenate([np.empty(0, np.int64), *self._pieces(start, stop)])

    def _pieces(self, start: int, stop: int) -> Iterator[Indices]:
        number = int(np.searchsorted(self._window_ends, start, side="right"))
        while start < stop:
            first = int(self._window_ends[number - 1]) if number else 0
            last = int(self._window_ends[number])
            yield self._mixed(number)[start - first : stop - first]
            start, number = last, number + 1

    def _mixed(self, number: int) -> Indices:
        cut = slice(number * self._window, (number + 1) * self._window)
        groups = zip(self._starts[cut], self._rows[cut], strict=True)
        rows = np.concatenate([np.arange(start, start + size) for start, size in groups])
        return rows[permutation(len(rows), *self._words, number)]


def permutation(size: int, *words: int) -> Indices:
    """Return a permutation of range(size) that the words seed.

    Arithmetic of our own (splitmix64 keys, sorted) because numpy may change its generators' streams between
    versions, and a run continued on a newer image must find the same order.
    """
    state = _GOLDEN
    for word in words:
        state = _mix_int(state ^ (word & _MASK))
    keys = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(state)
    for shift, factor in _ROUNDS:
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    keys ^= keys >> np.uint64(31)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _mix_int(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    for shift, factor in _ROUNDS:
        value = ((value ^ (value >> shift)) * factor) & _MASK
    return value ^ (value >> 31)


def _even_groups(num_samples: int) -> Indices:
    sizes = np.full(-(-num_samples // GROUP), GROUP, np.int64)
    sizes[-1] -= sizes.sum() - num_samples
    return sizes
