"""Record -> Sample, or the reason why not.

settle  turns as annotated -> system? (user assistant)+     what was mended is named
check   what can be told without opening a picture
load    every picture read and fully decoded                its bytes stay as they were
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field

from rayllava.data.sources import Record
from rayllava.place import Place, names_nothing
from rayllava.records import IMAGE_MARK, Sample, Turn
from rayllava.spec import Spec

MAX_BYTES = 60 << 20
"""Most bytes of pictures in one record: 32 of them must fit into one column chunk of Arrow."""

Policy = Literal["fail", "skip"]


class ShardSpec(Spec):
    """The knobs of sharding."""

    images: str = ""
    """Folder that the paths of the records are relative to; text alone needs none. A mixture names its own."""
    policy: Policy = "fail"
    """What a bad record does: fail ends the job, skip lists it in rejected.jsonl and goes on."""
    budget: float | None = Field(None, ge=0, le=1)
    """Share of all records that policy=skip may leave out; empty is 0.01, or ten records if that is more."""
    rows: int = Field(1024, ge=1)
    """About so many records make a shard."""
    seed: int = 42
    """Of the order in which records are cut into shards."""

    def allowed(self, num_records: int) -> int:
        """Return how many of the records may be rejected."""
        if self.policy == "fail":
            return 0
        return int(self.budget * num_records) if self.budget is not None else max(10, num_records // 100)


@dataclass(frozen=True, slots=True, order=True)
class Rejected:
    """A record that became no sample: a line of rejected.jsonl."""

    source: str
    """The portion, and the file where it has several."""
    line: int
    copy: int
    id: str
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def settle(record: Record) -> tuple[Record, list[str]]:
    """Return the record with its turns in the order that training needs, and what was done to get there.

    The mending is what LLaVA or XTuner do in silence; what they crash on is left to `check`.
    """
    turns, mended = list(record.turns), []
    head = [turns.pop(0)] if turns and turns[0].role == "system" else []
    while turns and turns[0].role == "assistant":
        turns.pop(0)
        mended.append("answer before the first question dropped")
    joined: list[Turn] = []
    for turn in turns:
        if joined and turn.role == "user" and joined[-1].role == "user":
            joined[-1] = Turn(role="user", text=f"{joined[-1].text}\n{turn.text}")
            mended.append("questions in a row joined")
        else:
            joined.append(turn)
    if joined and joined[-1].role == "user":
        joined.pop()
        mended.append("question without an answer dropped")
    return (replace(record, turns=(*head, *joined)) if mended else record), mended


def check(record: Record) -> str:
    """Return why a settled record cannot become a sample; empty when nothing speaks against it so far."""
    if record.fault:
        return record.fault
    dialogue = record.turns[1:] if record.turns and record.turns[0].role == "system" else record.turns
    for number, turn in enumerate(dialogue):
        if turn.role != ("user", "assistant")[number % 2]:
            return f"turn {number + 1 + len(record.turns) - len(dialogue)} is a second {turn.role} turn in a row"
    if not any(turn.text.strip() for turn in dialogue[1::2]):
        return "it has no answer to learn from"
    return _unwritable(record) or _misplaced(record.images) or _miscounted(dialogue[::2], record.images)


def load(record: Record, images: Place | None) -> Sample:
    """Return the sample with its pictures as they lie in the folder, or in the record itself.

    Raises ValueError with the reason when a picture is missing, too large or cannot be decoded completely.
    An error of the disk or store itself rises: it says nothing about the record.
    """
    contents = []
    for number, image in enumerate(record.images, start=1):
        name = str(number) if isinstance(image, bytes) else image
        content = image if isinstance(image, bytes) else _content(images, name)
        try:
            _check_picture(content)
        except ValueError as error:
            raise ValueError(f"image {name}: {error}") from error
        contents.append(content)
    if (size := sum(map(len, contents))) > MAX_BYTES:
        raise ValueError(f"its images take {size / 2**20:.0f} MiB; {MAX_BYTES >> 20} is the most")
    return Sample(id=record.id, turns=record.turns, images=tuple(contents))


_CHECKED: set[bytes] = set()
"""Digests of pictures that this process has decoded: sets that ask many questions about one picture are the rule."""
_MOST_CHECKED = 1 << 18


def _check_picture(content: bytes) -> None:
    from rayllava.prompt import pixels

    digest = hashlib.blake2b(content, digest_size=16).digest()
    if digest in _CHECKED:
        return
    pixels.check(content)
    if len(_CHECKED) == _MOST_CHECKED:
        _CHECKED.clear()
    _CHECKED.add(digest)


def _content(images: Place | None, name: str) -> bytes:
    assert images is not None, "pictures without a folder were refused when the record was read"
    place = images / name
    try:
        if not place.is_file():
            raise ValueError(f"image {name} is missing")
        if (size := place.size()) > MAX_BYTES:
            raise ValueError(f"image {name} takes {size / 2**20:.0f} MiB; {MAX_BYTES >> 20} is the most")
        return place.read_bytes()
    except OSError as error:
        if not names_nothing(error):
            raise
        raise ValueError(f"image {name} cannot be read ({error.strerror})") from error


def _unwritable(record: Record) -> str:
    try:
        names = [image for image in record.images if isinstance(image, str)]
        "".join([record.id, *names, *(turn.text for turn in record.turns)]).encode()
    except UnicodeEncodeError:
        return "its text holds half a surrogate pair, which is no character"
    return ""


def _misplaced(images: Iterable[str | bytes]) -> str:
    for image in images:
        if isinstance(image, str):
            path = PurePosixPath(image)
            if path.is_absolute() or ".." in path.parts:
                return f"image {image} lies outside the image folder"
    return ""


def _miscounted(questions: Iterable[Turn], images: tuple[str | bytes, ...]) -> str:
    marks = [question.text.count(IMAGE_MARK) for question in questions]
    if sum(marks) == len(images):
        return ""
    if len(images) == 1 and sum(1 for count in marks if count) == 1:
        return ""  # LLaVA takes the marks of a turn for one
    return f"{_num(sum(marks), f'{IMAGE_MARK} mark')} in its questions for {_num(len(images), 'image')}"


def _num(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
