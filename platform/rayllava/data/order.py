"""Which rows stand together: an epoch's order, and the steps that a window of it is grouped into.

order(epoch)   row groups shuffled, then rows shuffled inside windows of a few row groups
grouped        the rows of some whole steps dealt anew, so that the rows of a step are alike
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class Order:
    """A permutation of all rows with random access.

    Row groups are permuted as a whole, over all shards; rows only inside a window of consecutive permuted
    groups. A reader that keeps one window of groups therefore reads every group once. The price: rows of one
    group always meet within a window. `jobs/shard.py` shuffles all records before it cuts, so a group is
    itself a random draw and the meeting means nothing. Memory is a few numbers a row group plus one window.

    The price at 100,000 rows and steps of 128 (tests/data/test_order.py): neighbours of the source stand 1/3 of
    an epoch apart on average after both shuffles, as after a perfect one, and 1/45 without the shuffle at
    sharding. Of the pairs that share a step 0.9 % share one in the next epoch too; by chance it would be 0.13 %.
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


def grouped(
    rows: Indices,
    *,
    lengths: Indices,
    pictured: NDArray[np.bool_],
    size: int,
    by_length: bool,
    words: tuple[int, ...],
) -> list[Indices]:
    """Return the rows as steps of `size`, each with pictures or without, its longest rows first.

    What is left of either kind makes one mixed step at most, and the short last step if there is one. The other
    steps come in an order that `words` seed. With `by_length` the rows of a step have like lengths. The rows of a
    step come from all over the window, so a reader reads every row group once only if it keeps those of them all.
    """
    whole, left = [], []
    for kind, members in enumerate((np.flatnonzero(pictured), np.flatnonzero(~pictured))):
        members = members[permutation(len(members), *words, kind)]
        if by_length:
            members = _longest_first(members, lengths)
        cut = len(members) - len(members) % size
        whole.append(members[:cut])
        left.append(members[cut:])
    strip = np.concatenate(whole + left)
    steps = [strip[start : start + size] for start in range(0, len(strip), size)]
    num_full = len(strip) // size
    turns = permutation(num_full, *words, 2)
    shuffled = [steps[turn] for turn in turns] + steps[num_full:]
    return [rows[_longest_first(step, lengths)] for step in shuffled]


def _longest_first(members: Indices, lengths: Indices) -> Indices:
    return members[np.argsort(-lengths[members], kind="stable")]


def permutation(size: int, *words: int) -> Indices:
    """Return a permutation of range(size) that the words seed.

    Arithmetic of our own (splitmix64 keys, sorted) because numpy may change its generators' streams between
    versions, and a run continued on a newer image must find the same order.
    """
    keys = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(mixed(*words))
    for shift, factor in _ROUNDS:
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    keys ^= keys >> np.uint64(31)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def mixed(*words: int) -> int:
    """Return a number below 2**64 that the words seed: one step of splitmix64 for each."""
    state = _GOLDEN
    for word in words:
        value = ((state ^ (word & _MASK)) + _GOLDEN) & _MASK
        for shift, factor in _ROUNDS:
            value = ((value ^ (value >> shift)) * factor) & _MASK
        state = value ^ (value >> 31)
    return state


_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
