"""Where annotations come from: one file a format.

from rayllava.data.sources import SOURCES
for record in SOURCES["llava"].read(Path("llava_v1_5_mix665k.json")): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rayllava.records import Turn
from rayllava.shelf import Shelf


@dataclass(frozen=True, slots=True)
class Record:
    """A dialogue as annotated: its pictures are still names."""

    line: int
    """1-based line of a file of lines, or place in an array: with the file, what identifies the record."""
    id: str
    """As written; neither unique nor ours to change."""
    turns: tuple[Turn, ...] = ()
    images: tuple[str, ...] = ()
    """Paths relative to the image folder, in the order of their marks."""
    fault: str = ""
    """Why the format cannot make a dialogue of it; empty when it can."""


@dataclass(frozen=True)
class Source:
    """How one format of annotations is read."""

    read: Callable[[Path], Iterator[Record]]
    """Yield every record in file order. A file that cannot be read at all raises ValueError with the place
    and the cure; a single record that makes no sense is yielded with its fault."""


SOURCES = Shelf("rayllava.data.sources", Source)
