"""Referring expressions as XTuner's preprocessing writes them (RefCOCOJson/train.json): where is what is named?

{"id": "refcoco-unc-...", "image": "coco/train2017/000000000001.jpg", "sents": "the left dog",
 "bbox": [x, y, width, height], "height": 480, "width": 640}        pixels of the picture as it is

Each row is asked in all seven ways. XTuner then keeps 70,000 drawn at random: `"most": 70000` in a mixture.
A box is in hundredths of the picture's sides, also where the picture is padded to a square before it is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rayllava.data.sources import Record, Source
from rayllava.data.sources._dialogue import id_of, kind, record_of
from rayllava.data.sources._jsonrows import rows
from rayllava.place import Place

WAYS = (
    "[refer] {}",
    "[refer] give me the location of {}",
    "[refer] where is {} ?",
    "[refer] from this image, tell me the location of {}",
    "[refer] the location of {} is",
    "[refer] could you tell me the location for {} ?",
    "[refer] where can I locate the {} ?",
)


def read(annotations: Place) -> Iterator[Record]:
    """Yield seven records for every row: its words are the question, its box the answer."""
    return expanded(annotations, lambda words, box: [(way.format(words), box) for way in WAYS])


PLUG = Source(read=read)


def expanded(annotations: Place, ask: Callable[[str, str], list[tuple[str, str]]]) -> Iterator[Record]:
    """Yield a record for every (question, answer) that `ask` makes of the words and the box of a row."""
    for line, row in rows(annotations):
        if not isinstance(row, dict):
            yield record_of(line, row)
            continue
        id_ = id_of(line, row)
        try:
            words, box = _words(row), _box(row)
        except ValueError as error:
            yield Record(line=line, id=id_, fault=str(error))
            continue
        for number, (question, answer) in enumerate(ask(words, box)):
            talk = [{"from": "human", "value": f"{question}\n<image>"}, {"from": "gpt", "value": answer}]
            yield record_of(line, {"id": f"{id_}-{number}", "image": row.get("image"), "conversations": talk})


def _words(row: dict[str, Any]) -> str:
    words = row.get("sents")
    if not isinstance(words, str):
        raise ValueError(f"sents is {kind(words)}, not text")
    return words


def _box(row: dict[str, Any]) -> str:
    """Return `{<x1><y1><x2><y2>}`; ValueError when a number is missing or the box lies outside of the picture."""
    width, height = (_number(row.get(side), side) for side in ("width", "height"))
    bbox = row.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise ValueError(f"bbox={bbox!r:.40} is not [x, y, width, height]")
    x, y, wide, high = (_number(value, "bbox") for value in bbox)
    if min(width, height) <= 0:
        raise ValueError(f"the picture is {width:g} x {height:g} pixels")
    if min(x, y) < 0 or min(wide, high) <= 0 or x > width or y > height:
        raise ValueError(f"bbox={bbox} has no place in a picture of {width:g} x {height:g} pixels")
    # Divided first, as XTuner does: int(100 * 29 / 100) would be 29, this is 28.
    corners = (x / width, y / height, (x + wide) / width, (y + high) / height)
    return "{" + "".join(f"<{int(corner * 100)}>" for corner in corners) + "}"


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e9:
        raise ValueError(f"{name} is {kind(value)}, not a number" if value is None else f"{name}={value!r:.40}")
    return value
