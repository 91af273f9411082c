"""One row of JSON or of a table -> Record, whichever of the usual layouts it has.

{"id": 7, "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}
{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}, ...]}
{"texts": [{"user": "What?", "assistant": "A dog."}, ...]}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rayllava.data.sources import Record
from rayllava.records import IMAGE_MARK, Role, Turn

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

TALKS = ("conversations", "messages", "texts")
"""Keys that a dialogue stands under, the first that is there counts."""


def record_of(line: int, row: Any, *, images: Sequence[str | bytes] | None = None) -> Record:
    """Return the record of a row; `images` are its pictures when they do not stand in the row itself."""
    if not isinstance(row, dict):
        return Record(line=line, id=str(line), fault=f"the record is {kind(row)}, not an object")
    id_ = id_of(line, row)
    try:
        pictures = _images(row) if images is None else tuple(images)
        return Record(line=line, id=id_, turns=_turns(row, len(pictures)), images=pictures)
    except _Fault as fault:
        return Record(line=line, id=id_, fault=str(fault))


def caption_of(line: int, id_: str, caption: Any, images: Sequence[str | bytes]) -> Record:
    """Return a record that shows pictures and answers with their caption."""
    if not isinstance(caption, str):
        return Record(line=line, id=id_, fault=f"the caption is {kind(caption)}, not text")
    if not images:
        return Record(line=line, id=id_, fault="it has a caption but no picture")
    turns = (Turn("user", IMAGE_MARK * len(images)), Turn("assistant", caption))
    return Record(line=line, id=id_, turns=turns, images=tuple(images))


def id_of(line: int, row: dict[str, Any]) -> str:
    """Return the id as text: some sets count with integers, and a record without one goes by its line."""
    number = row.get("id")
    return str(number) if isinstance(number, str | int) and not isinstance(number, bool) else str(line)


def kind(value: Any) -> str:
    names = {type(None): "missing", dict: "an object", list: "a list", str: "text", bool: "a truth value"}
    return names.get(type(value), "a number")


def _turns(row: dict[str, Any], num_images: int) -> tuple[Turn, ...]:
    key = next((key for key in TALKS if row.get(key) is not None), TALKS[0])
    talk = row.get(key)
    if not isinstance(talk, list):
        raise _Fault(f"{key} is {kind(talk)}, not a list")
    if key == "texts":
        return tuple(_rounds(talk, num_images))
    return tuple(_turn(number, turn) for number, turn in enumerate(talk, start=1))


def _rounds(talk: list[Any], num_images: int) -> Iterator[Turn]:
    """Yield the two turns of every round; this layout marks no place, its pictures come before its first question."""
    for number, both in enumerate(talk, start=1):
        if not isinstance(both, dict):
            raise _Fault(f"round {number} is {kind(both)}, not an object")
        for role in ("user", "assistant"):
            if not isinstance(text := both.get(role), str):
                raise _Fault(f"{role} of round {number} is {kind(text)}, not text")
            if number == 1 and role == "user" and IMAGE_MARK not in text:
                text = f"{IMAGE_MARK}\n" * num_images + text
            yield Turn(ROLES[role], text)


def _turn(number: int, turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise _Fault(f"turn {number} is {kind(turn)}, not an object")
    speaker, text = _either(turn, "from", "role"), _either(turn, "value", "content")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise _Fault(f"turn {number} is from {speaker!r}; known are {', '.join(ROLES)}")
    if isinstance(text, list):
        # A line each: marks are cut out of a question later on, and the words around one must not grow together.
        text = "\n".join(_part(number, part) for part in text)
    if not isinstance(text, str):
        raise _Fault(f"the value of turn {number} is {kind(text)}, not text")
    return Turn(role=ROLES[speaker], text=text)


def _part(number: int, part: Any) -> str:
    if not isinstance(part, dict):
        raise _Fault(f"a part of turn {number} is {kind(part)}, not an object")
    if (type_ := part.get("type")) == "image":
        return IMAGE_MARK
    if type_ != "text":
        raise _Fault(f"a part of turn {number} is of type {type_!r}; known are text, image")
    if not isinstance(text := part.get("text"), str):
        raise _Fault(f"the text of a part of turn {number} is {kind(text)}, not text")
    return text


def _images(row: dict[str, Any]) -> tuple[str, ...]:
    image = _either(row, "image", "images")
    names = [] if image is None else image if isinstance(image, list) else [image]
    for name in names:
        if not isinstance(name, str):
            raise _Fault(f"image is {kind(name)}, not a path")
        if not name.strip():
            raise _Fault("image is an empty path")
    return tuple(names)


def _either(row: dict[str, Any], key: str, other: str) -> Any:
    return row.get(other) if row.get(key) is None else row[key]


class _Fault(Exception):
    """One record is not what the format says."""
