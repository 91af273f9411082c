"""Which samples step k computes: a pure function of the shards, the seed and the recipe, and of nothing else.

order(epoch)   row groups shuffled, then rows shuffled inside windows of a few row groups
step(k)        the next `global_batch` samples of the order, or of a window of it that is grouped
atoms(k)       runs of at most `atom` samples of the step, or rows of examples packed into `max_tokens` positions
share(k, W)    whole atoms dealt to W ranks by cost; None is a dummy that keeps the ranks in step

Any step is found at once: only its epoch's row groups are shuffled and only its own window is opened.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from numpy.typing import NDArray

from rayllava.data.order import Indices, Order, grouped

if TYPE_CHECKING:
    from rayllava.data.shards import ShardManifest
    from rayllava.place import Place
    from rayllava.recipe import DataSpec, ProcessorSpec

Tail = Literal["short", "drop", "repeat"]
Group = Literal["none", "modality", "length"]

GROUP = 16
"""Rows stored together when nothing else is said."""
WINDOW = 32
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
    """Positions it computes: rows times the longest of them, or the sum of packed ones. That attention grows with
    the square of an example is left out."""


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
        images: NDArray[np.integer] | None = None,
        group: Group = "none",
        group_window: int = 50,
        max_tokens: int | None = None,
        max_length: int | None = None,
    ) -> None:
        """Plan over `num_samples` rows.

        `lengths` holds each row's positions and `images` its pictures, both indexed and never copied; a length
        counts as `max_length` at most. Without grouping or packing, lengths move nothing but the dealing to
        ranks, and may be estimates. `group_rows` holds the rows of each stored row group in order; without it
        rows are taken to be stored by 16.
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
        if group != "none":
            assert lengths is not None and images is not None, f"data.group={group} needs lengths and images"
            assert len(images) == num_samples, "a number of images for every sample"
        if max_tokens is not None:
            assert lengths is not None, f"data.max_tokens={max_tokens} needs the exact length of every sample"
            assert max_length is not None and max_length <= max_tokens, f"{max_length=} for {max_tokens=}"
        self.num_samples = num_samples
        self.lengths = lengths
        self.images = images
        self.seed = seed
        self.global_batch = global_batch
        self.epochs = epochs
        self.atom = atom
        self.tail = tail
        self.window = window
        self.group = group
        self.group_window = group_window
        self.max_tokens = max_tokens
        self.max_length = max_length
        whole, rest = divmod(num_samples, global_batch)
        self.steps_per_epoch = whole + (1 if rest and tail != "drop" else 0)
        self._group_rows = group_rows
        self._orders: dict[int, Order] = {}
        self._opened: tuple[tuple[int, int], list[Indices]] | None = None

    @classmethod
    def of(
        cls,
        shards: ShardManifest,
        data: DataSpec,
        *,
        seed: int,
        num_image_tokens: int = 576,
        lengths: NDArray[np.integer] | None = None,
        max_length: int | None = None,
    ) -> Self:
        """Plan over a shard folder.

        `lengths` are exact ones, which packing demands; without them they are estimated, `num_image_tokens` a
        picture. With `data.group` or `data.max_tokens` they decide what a step computes, so whoever opens the plan
        of a run passes the same.
        """
        assert data.max_tokens is None or lengths is not None, (
            f"data.max_tokens={data.max_tokens} packs by exact lengths; measure them and pass `lengths`"
        )
        return cls(
            shards.num_samples,
            shards.lengths(num_image_tokens) if lengths is None else lengths,
            seed=seed,
            global_batch=data.global_batch,
            epochs=data.epochs,
            atom=data.atom,
            tail=data.tail,
            group_rows=shards.group_rows,
            images=shards.row_images,
            group=data.group,
            group_window=data.group_window,
            max_tokens=data.max_tokens,
            max_length=max_length,
        )

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @cached_property
    def max_workers(self) -> int:
        """Atoms of a full step, of an average one if packed: more workers could not all have work."""
        if self.max_tokens is None:
            return -(-self.global_batch // self.atom)
        return -(-self.global_batch * self._total_length() // (self.num_samples * self.max_tokens))

    def largest(self) -> tuple[int, int, int]:
        """Return (rows, positions, pictures) of the largest atom that the plan can hold; pictures at most so many.

        Lengths and pictures are those that the plan knows, estimates where it does not pack.
        """
        cuts = range(0, self.num_samples, _PIECE)
        most = 0 if self.images is None else int(max(self.images[cut : cut + _PIECE].max() for cut in cuts))
        if self.max_tokens is not None:
            return 1, self.max_tokens, self.max_tokens if most else 0
        rows = min(self.atom, self.num_samples)
        longest = 1 if self.lengths is None else max(int(self._lengths(slice(c, c + _PIECE)).max()) for c in cuts)
        return rows, longest, rows + most - 1 if most else 0

    def epoch_of(self, k: int) -> int:
        return k // self.steps_per_epoch

    def step(self, k: int) -> Step:
        """Return step `k`, 0-based; any step costs the same, wherever the walk was before."""
        assert 0 <= k < self.num_steps, f"step {k} of {self.num_steps}"
        epoch, within = divmod(k, self.steps_per_epoch)
        if self.group == "none":
            samples = self._drawn(epoch, within, within + 1)
        else:
            number, at = divmod(within, self.group_window)
            samples = self._window(epoch, number)[at]
        return Step(index=k, epoch=epoch, samples=samples)

    def atoms(self, k: int) -> list[Atom]:
        """Return the microbatches of step `k`."""
        samples = self.step(k).samples
        if self.max_tokens is not None:
            lengths = self._lengths(samples)
            bins = packed(lengths, self.max_tokens)
            return [Atom(i, samples[bin_], cost=int(lengths[bin_].sum())) for i, bin_ in enumerate(bins)]
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
            lower = "data.max_tokens" if self.max_tokens else "data.atom" if self.atom > 1 else None
            cure = f", or lower {lower}" if lower else ", or raise data.global_batch"
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

    def _drawn(self, epoch: int, first: int, stop: int) -> Indices:
        """Return the samples that the order holds for an epoch's steps `first` to `stop`."""
        order = self.order(epoch)
        start, end = first * self.global_batch, stop * self.global_batch
        parts = [order.rows(start, min(end, self.num_samples))]
        missing = end - self.num_samples if self.tail == "repeat" else 0
        while missing > 0:
            again = min(missing, self.num_samples)
            parts.append(order.rows(0, again))
            missing -= again
        return np.concatenate(parts)

    def _window(self, epoch: int, number: int) -> list[Indices]:
        """Return the grouped steps of an epoch's window; the last window stays in memory."""
        opened = self._opened
        if opened is None or opened[0] != (epoch, number):
            assert self.images is not None
            first = number * self.group_window
            rows = self._drawn(epoch, first, min(first + self.group_window, self.steps_per_epoch))
            steps = grouped(
                rows,
                lengths=self._lengths(rows),
                pictured=self.images[rows] > 0,
                size=self.global_batch,
                by_length=self.group == "length",
                words=(self.seed, epoch, number),
            )
            self._opened = opened = (epoch, number), steps
        return opened[1]

    def _atom(self, index: int, samples: Indices) -> Atom:
        longest = 1 if self.lengths is None else int(self._lengths(samples).max())
        return Atom(index=index, samples=samples, cost=len(samples) * longest)

    def _lengths(self, samples: Indices | slice) -> Indices:
        assert self.lengths is not None
        lengths = self.lengths[samples].astype(np.int64)
        return lengths if self.max_length is None else np.minimum(lengths, self.max_length)

    def _total_length(self) -> int:
        cuts = range(0, self.num_samples, _PIECE)
        return sum(int(self._lengths(slice(cut, cut + _PIECE)).sum()) for cut in cuts)


def plan_of(
    shards: ShardManifest, data: DataSpec, processor: ProcessorSpec, *, seed: int, lengths: Place | None
) -> Plan:
    """Return the plan of a run; `lengths` is its file of exact lengths, which packing needs."""
    exact = None
    if lengths is not None and lengths.remote:
        exact = np.load(io.BytesIO(lengths.read_bytes()), allow_pickle=False)
    elif lengths is not None:
        exact = np.load(lengths.local, mmap_mode="r", allow_pickle=False)
    return Plan.of(
        shards,
        data,
        seed=seed,
        num_image_tokens=processor.num_image_tokens,
        lengths=exact,
        max_length=processor.max_length,
    )


_PIECE = 1 << 20
"""Lengths that are added up at a time, so that a mapped file is never in memory as a whole."""


def packed(lengths: Indices, limit: int) -> list[Indices]:
    """Return which examples share a row of at most `limit` positions: first fit, the longest first."""
    assert lengths.max() <= limit, f"an example of {lengths.max()} positions for rows of {limit}"
    room = np.full(len(lengths), limit)
    bins: list[list[int]] = [[] for _ in lengths]
    for index in np.argsort(-lengths, kind="stable"):
        first = int(np.argmax(room >= lengths[index]))
        room[first] -= lengths[index]
        bins[first].append(int(index))
    return [np.array(bin_) for bin_ in bins if bin_]


def _even_groups(num_samples: int) -> Indices:
    sizes = np.full(-(-num_samples // GROUP), GROUP, np.int64)
    sizes[-1] -= sizes.sum() - num_samples
    return sizes
