"""LLaVA's conversation JSON, as an array or one object a line; ShareGPT4V and InternVL write the same.

{"id": 7, "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"},
                                                   {"from": "gpt", "value": "A dog."}]}
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayllava.data.sources import Record, Source
from rayllava.records import Role, Turn

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def read(annotations: Path) -> Iterator[Record]:
    """Yield the records of a JSON array or of JSON lines."""
    rows = _lines if _begins(annotations) == "{" else _array
    for line, row in rows(annotations):
        yield _record(line, row)


PLUG = Source(read=read)


def _begins(annotations: Path) -> str:
    """Return the first character, after refusing what people download by mistake."""
    if not annotations.is_file():
        raise ValueError(f"annotations={annotations} is not a file; give the JSON or JSONL file itself")
    with annotations.open("rb") as file:
        head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"<"):
        raise ValueError(
            f"annotations={annotations} is a web page, not JSON; download the file itself "
            "(on Hugging Face the address says /resolve/, not /blob/)"
        )
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"annotations={annotations} is a git-lfs pointer, not the data; run `git lfs pull` where it lies"
        )
    if not head:
        raise ValueError(f"annotations={annotations} is empty; download it again")
    if head[:1] not in b"[{":
        raise ValueError(
            f"annotations={annotations} is malformed JSON at line 1 column 1: it is neither an array of "
            "records nor one record a line"
        )
    return head[:1].decode()


def _array(annotations: Path) -> Iterator[tuple[int, Any]]:
    # The whole array in memory, several times its size on disk: fine for the sets of LLaVA 1.5, naive beyond.
    try:
        rows = json.loads(annotations.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_text(annotations, error) from error
    except json.JSONDecodeError as error:
        raise _malformed(annotations, error, line=error.lineno) from error
    yield from enumerate(rows, start=1)


def _lines(annotations: Path) -> Iterator[tuple[int, Any]]:
    with annotations.open(encoding="utf-8-sig") as file:
        try:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    yield line, json.loads(text)
        except UnicodeDecodeError as error:
            raise _not_text(annotations, error) from error
        except json.JSONDecodeError as error:
            raise _malformed(annotations, error, line=line) from error


def _malformed(annotations: Path, error: json.JSONDecodeError, *, line: int) -> ValueError:
    return ValueError(
        f"annotations={annotations} is malformed JSON at line {line} column {error.colno}: {error.msg}; "
        "download it again or mend it there"
    )


def _not_text(annotations: Path, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"annotations={annotations} is not UTF-8 text ({error.reason}); download it again")


def _record(line: int, row: Any) -> Record:
    if not isinstance(row, dict):
        return Record(line=line, id=str(line), fault=f"the record is {_kind(row)}, not an object")
    number = row.get("id")
    # Some sets count with integers; a record without an id goes by its line.
    id_ = str(number) if isinstance(number, str | int) and not isinstance(number, bool) else str(line)
    try:
        return Record(line=line, id=id_, turns=_turns(row), images=_images(row))
    except _Fault as fault:
        return Record(line=line, id=id_, fault=str(fault))


def _turns(row: dict[str, Any]) -> tuple[Turn, ...]:
    talk = row.get("conversations")
    if not isinstance(talk, list):
        raise _Fault(f"conversations is {_kind(talk)}, not a list")
    return tuple(_turn(number, turn) for number, turn in enumerate(talk, start=1))


def _turn(number: int, turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise _Fault(f"turn {number} is {_kind(turn)}, not an object")
    speaker, text = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise _Fault(f"turn {number} is from {speaker!r}; known are {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise _Fault(f"the value of turn {number} is {_kind(text)}, not text")
    return Turn(role=ROLES[speaker], text=text)


def _images(row: dict[str, Any]) -> tuple[str, ...]:
    image = row.get("image")
    names = [] if image is None else image if isinstance(image, list) else [image]
    for name in names:
        if not isinstance(name, str):
            raise _Fault(f"image is {_kind(name)}, not a path")
        if not name.strip():
            raise _Fault("image is an empty path")
    return tuple(names)


def _kind(value: Any) -> str:
    names = {type(None): "missing", dict: "an object", list: "a list", str: "text", bool: "a truth value"}
    return names.get(type(value), "a number")


class _Fault(Exception):
    """One record is not what the format says."""
