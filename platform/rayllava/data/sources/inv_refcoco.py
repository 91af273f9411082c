"""Referring expressions the other way round: what is in this box? Rows and boxes are those of refcoco."""

from __future__ import annotations

from collections.abc import Iterator

from rayllava.data.sources import Record, Source
from rayllava.data.sources.refcoco import expanded
from rayllava.place import Place

WAYS = (
    "[identify] {}",
    "[identify] what object is in this location {}",
    "[identify] identify the object present at this location {}",
    "[identify] what is it in {}",
    "[identify] describe this object in {}",
    "[identify] this {} is",
    "[identify] the object in {} is",
)


def read(annotations: Place) -> Iterator[Record]:
    """Yield seven records for every row: its box is in the question, its words are the answer."""
    return expanded(annotations, lambda words, box: [(way.format(box), words) for way in WAYS])


PLUG = Source(read=read)
