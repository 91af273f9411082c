"""Which samples a run has counted: a chain of segments, one for every checkpoint.

    RUN/ledger/000001-000100.1.jsonl    steps 1 to 100 as attempt 1 computed them; never changed, never removed
    RUN/ledger.jsonl                    the steps of the newest checkpoint's chain, derived from it

A checkpoint's manifest names its segment by digest, and a segment the one before it, so the newest checkpoint
vouches for every step back to the first. A line is written from atoms that reached the backward pass, never from
the plan. Samples go by their keys, see records.Sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from rayllava import durable
from rayllava.place import Place
from rayllava.spec import Spec


class Link(Spec):
    """A segment as its successor or its checkpoint names it."""

    file: str
    """Under RUN/ledger."""
    digest: str


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What one rank computed of a step, or, merged, what all of them did."""

    step: int
    """1-based."""
    epoch: int
    """0-based."""
    world_size: int
    attempt: int
    atoms: dict[int, tuple[str, ...]]
    """The keys of each atom's samples, by the atom's index in the step; dummies have none and are left out."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Why samples were computed without weight, by their keys."""

    def as_dict(self) -> dict[str, Any]:
        """Return the entry as a line of a segment."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "world_size": self.world_size,
            "attempt": self.attempt,
            "atoms": [{"index": index, "samples": list(self.atoms[index])} for index in sorted(self.atoms)],
            "rejected": self.rejected,
        }

    @classmethod
    def of(cls, line: dict[str, Any]) -> Self:
        atoms = {atom["index"]: tuple(atom["samples"]) for atom in line["atoms"]}
        return cls(**{**line, "atoms": atoms})


@dataclass(frozen=True, slots=True)
class Segment:
    """The steps between two checkpoints."""

    link: Link
    first: int
    """1-based."""
    last: int
    attempt: int
    """That wrote it."""
    parent: Link | None
    entries: list[LedgerEntry]


class LedgerError(ValueError):
    """A segment that is missing or is not what its successor says; the message names it."""


def merge(entries: Iterable[LedgerEntry], *, first: int, last: int, world_size: int) -> list[LedgerEntry]:
    """Return one entry a step of what all ranks computed from step `first` to `last`."""
    steps: dict[int, list[LedgerEntry]] = {step: [] for step in range(first, last + 1)}
    for entry in entries:
        assert entry.step in steps, f"step {entry.step} in the ledger of {first} to {last}"
        steps[entry.step].append(entry)
    return [_merged(parts, world_size) for parts in steps.values()]


def _merged(parts: list[LedgerEntry], world_size: int) -> LedgerEntry:
    assert len(parts) == world_size, f"{len(parts)} ranks computed a step at W={world_size}"
    one = parts[0]
    atoms: dict[int, tuple[str, ...]] = {}
    rejected: dict[str, str] = {}
    for part in parts:
        assert (part.epoch, part.attempt) == (one.epoch, one.attempt), f"ranks disagree about step {one.step}"
        assert not atoms.keys() & part.atoms.keys(), f"an atom of step {one.step} was computed twice"
        atoms |= part.atoms
        rejected |= part.rejected
    assert atoms.keys() == set(range(len(atoms))), f"step {one.step} computed the atoms {sorted(atoms)}"
    return LedgerEntry(one.step, one.epoch, world_size, one.attempt, atoms, rejected)


def write_segment(run: Place, entries: list[LedgerEntry], *, attempt: int, parent: Link | None) -> Link:
    """Write the merged entries of the steps since `parent` and return what names them."""
    first, last = entries[0].step, entries[-1].step
    header = {
        "from": first,
        "to": last,
        "attempt": attempt,
        "parent": parent.digest if parent else "",
        "parent_file": parent.file if parent else "",
    }
    content = b"".join(_line(tree) for tree in (header, *(entry.as_dict() for entry in entries)))
    name = f"{first:06d}-{last:06d}.{attempt}.jsonl"
    (run / "ledger" / name).write_bytes(content)
    return Link(file=name, digest=durable.digest_bytes(content))


def chain(run: Place, newest: Link | None) -> Iterator[Segment]:
    """Yield the segments from the newest back to step 1; LedgerError where the chain is broken."""
    link = newest
    while link is not None:
        segment = read_segment(run, link)
        yield segment
        link = segment.parent


def read_segment(run: Place, link: Link) -> Segment:
    place = run / "ledger" / link.file
    try:
        content = place.read_bytes()
    except FileNotFoundError:
        raise LedgerError(f"{place} is missing") from None
    if durable.digest_bytes(content) != link.digest:
        raise LedgerError(f"{place} does not match its digest")
    header, *lines = (json.loads(line) for line in content.splitlines())
    parent = Link(file=header["parent_file"], digest=header["parent"]) if header["parent"] else None
    entries = [LedgerEntry.of(line) for line in lines]
    return Segment(link, header["from"], header["to"], header["attempt"], parent, entries)


def derive(run: Place, newest: Link | None) -> None:
    """Write RUN/ledger.jsonl: the lines of the whole chain, in order of steps."""
    segments = list(chain(run, newest))
    with (run / "ledger.jsonl").new_file() as file:
        for segment in reversed(segments):
            for entry in segment.entries:
                file.write(_line(entry.as_dict()))


def _line(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
