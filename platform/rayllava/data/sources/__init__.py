"""Where annotations come from: one file a format.

from rayllava.data.sources import SOURCES
for record in SOURCES["llava"].read(Place("llava_v1_5_mix665k.json")): ...
for portion in SOURCES["internvl"].portions(Place("internvl_1_2_finetune.json")): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rayllava.place import Place
from rayllava.records import Turn
from rayllava.shelf import Shelf


@dataclass(frozen=True, slots=True)
class Record:
    """A dialogue as annotated."""

    line: int
    """1-based line of a file of lines, or place in an array, a tar or a table: with the file, what identifies it."""
    id: str
    """As written; neither unique nor ours to change."""
    turns: tuple[Turn, ...] = ()
    images: tuple[str | bytes, ...] = ()
    """In the order of their marks: a path relative to the image folder, or the picture where the file holds it."""
    fault: str = ""
    """Why the format cannot make a dialogue of it; empty when it can."""


@dataclass(frozen=True, slots=True)
class Portion:
    """One ingredient of a mixture: annotations of one format, and how often they count."""

    name: str
    """Stands with every sample, and in rejected.jsonl."""
    source: str
    """Key of the source that reads it."""
    annotations: str
    """Path or URI of a file, or of a folder of files where the source reads several."""
    images: str = ""
    """Folder that image paths are relative to."""
    repeat: float = 1.0
    """Copies of each record; of a fraction, a seeded random draw of that share."""
    most: int | None = None
    """Keep a seeded random draw of so many records at most, before they are repeated."""
    num_records: int | None = None
    """What the mixture promises; a difference is told."""


@dataclass(frozen=True)
class Source:
    """How one format of annotations is read: record by record, or, for a mixture, portion by portion."""

    read: Callable[[Place], Iterator[Record]] | None = None
    """Yield every record of a file in order, in memory that does not grow with the file. A file that cannot be
    read at all raises ValueError with the place and the cure; a single record that makes no sense is yielded
    with its fault."""
    suffixes: tuple[str, ...] = ()
    """Ends of the names (lower case) of the files that count when the annotations are a folder."""
    portions: Callable[[Place], list[Portion]] | None = None
    """Read a mixture's own file."""

    def __post_init__(self) -> None:
        assert (self.read is None) != (self.portions is None), "a source reads records or lists portions"


SOURCES = Shelf("rayllava.data.sources", Source)


def records(source: str, annotations: Place) -> Iterator[Record]:
    """Yield the records of a file with the source of this key, which is no mixture."""
    read = SOURCES[source].read
    assert read is not None, f"{source} lists portions"
    return read(annotations)
