"""WebDataset tars: members that share a name up to its first dot, standing together, are one record.

dialogue/000.jpg  dialogue/000.json            an object with conversations, messages or a caption
dialogue/001.0.png  dialogue/001.1.png  dialogue/001.txt      a caption of two pictures

Pictures come in the order of their names, 2 before 10. Members are read from the stream; nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rayllava.data.sources import Record, Source
from rayllava.data.sources._dialogue import TALKS, caption_of, kind, record_of
from rayllava.data.sources._tar import LARGEST, BrokenTar, Member, members
from rayllava.place import Place

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
CAPTIONS = ("txt", "caption")
BESIDE = ("cls", "id", "index", "key", "url", "md5", "sha256")
"""Notes that other tools leave beside a record; not ours to read."""
PICKLES = ("pkl", "pickle", "pt", "pth", "pyd", "npy", "npz")


def read(annotations: Place) -> Iterator[Record]:
    """Yield a record for every group of members; what is wrong with one of them is the record's fault."""
    line, group = 0, None
    seen: set[int] = set()  # of the keys, eight bytes each: names themselves would grow with the file
    try:
        for member in members(annotations):
            if _litter(member.name):
                continue
            key = _key(member.name)
            if group is None or key != group.key:
                if group:
                    yield group.record(line)
                line, group = line + 1, _Group(key)
                if (mark := _mark(key)) in seen:
                    group.fault = f"{key} came before; members of one name must stand together"
                seen.add(mark)
            group.add(member)
    except BrokenTar as error:
        # The record before is whole when the member that broke off belongs to another.
        if group and error.name and _key(error.name) != group.key:
            yield group.record(line)
            line, group = line + 1, _Group(_key(error.name))
        yield Record(line=line or 1, id=group.key if group else "1", fault=f"the tar breaks off: {error}")
        return
    if group:
        yield group.record(line)


PLUG = Source(read=read, suffixes=(".tar", ".tar.gz", ".tgz"))


@dataclass
class _Group:
    """The members of one key."""

    key: str
    fault: str = ""
    contents: dict[str, bytes] = field(default_factory=dict)
    size: int = 0

    def add(self, member: Member) -> None:
        if self.fault:
            return
        name = member.name.removeprefix("./")
        self.size += len(member.content)
        if name.startswith("/") or ".." in name.split("/"):
            fault = "lies outside of the tar"
        elif member.fault:
            fault = f"is {member.fault}"
        elif _end(name) in PICKLES:
            fault = "is a pickle or may hold one; it is not opened"
        elif _end(name) not in (*PICTURES, *CAPTIONS, *BESIDE, "json"):
            fault = f"is unknown; known are {', '.join((*PICTURES, *CAPTIONS, 'json'))}"
        elif name in self.contents:
            fault = "stands there twice"
        elif self.size > LARGEST:
            fault = f"makes the record longer than {LARGEST >> 20} MiB"
        else:
            self.contents[name] = member.content
            return
        self.fault = f"member {name} {fault}"
        self.contents.clear()

    def record(self, line: int) -> Record:
        try:
            return self._record(line) if not self.fault else Record(line=line, id=self.key, fault=self.fault)
        except (ValueError, RecursionError) as error:  # json.loads, decode
            return Record(line=line, id=self.key, fault=f"it cannot be read: {error}")

    def _record(self, line: int) -> Record:
        images = [self.contents[name] for name in sorted(self.contents, key=_natural) if _end(name) in PICTURES]
        row, caption = self._only("json"), self._only(*CAPTIONS)
        if row is None and caption is None:
            return Record(line=line, id=self.key, fault="it has pictures but neither json nor txt")
        fields: Any = {} if row is None else json.loads(row)
        if not isinstance(fields, dict):
            return Record(line=line, id=self.key, fault=f"its json is {kind(fields)}, not an object")
        told = any(fields.get(key) is not None for key in TALKS)
        if told or (caption is None and "caption" not in fields):
            return record_of(line, {"id": self.key} | fields, images=images or None)
        text = fields.get("caption") if caption is None else caption.decode("utf-8-sig").strip()
        return caption_of(line, self.key, text, images)

    def _only(self, *ends: str) -> bytes | None:
        found = [content for name, content in self.contents.items() if _end(name) in ends]
        if len(found) > 1:
            raise ValueError(f"there are {len(found)} of {', '.join(ends)}")
        return found[0] if found else None


def _key(name: str) -> str:
    """Return the name up to the first dot behind its last slash."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    return folder + slash + base.partition(".")[0]


def _end(name: str) -> str:
    _, dot, end = name.rpartition("/")[2].rpartition(".")
    return end.lower() if dot else ""


def _litter(name: str) -> bool:
    """Say whether a file is what macOS leaves in archives."""
    base = name.rpartition("/")[2]
    return base.startswith("._") or base == ".DS_Store"


def _mark(key: str) -> int:
    content = key.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers by their value: a longer one, zeros in front left out, is greater."""
    parts = re.split(r"(\d+)", name)
    return [(len(part.lstrip("0")), part) if part.isdigit() else (0, part) for part in parts]
