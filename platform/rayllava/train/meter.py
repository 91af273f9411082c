"""What a run says about itself: a line a step in RUN/metrics.jsonl, a line a look in RUN/watch.jsonl."""

from __future__ import annotations

import json
import time
from typing import Any

from rayllava.place import Place

_UPLOAD_S = 5.0
"""Between two looks of a store at what was written since."""


class Meter:
    """Appends metrics, on rank 0 alone. Whole lines only: a torn last line of a killed run is cut off first.

    An object store cannot append: there the file is put anew every few seconds, and when the meter is closed.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        whole = b""
        if place.is_file():
            content = place.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                place.write_bytes(whole)
        if place.remote:
            self._content = bytearray(whole)
            self._put = time.monotonic()
        else:
            place.local.parent.mkdir(parents=True, exist_ok=True)
            self._file = place.local.open("a", buffering=1)

    def write(self, **values: Any) -> None:
        line = json.dumps(values) + "\n"
        if not self.place.remote:
            self._file.write(line)
            return
        self._content += line.encode()
        if time.monotonic() - self._put > _UPLOAD_S:
            self.flush()

    def flush(self) -> None:
        """Make what was written readable for others."""
        if self.place.remote:
            self.place.write_bytes(bytes(self._content))
            self._put = time.monotonic()


def read_lines(place: Place) -> list[dict[str, Any]]:
    """Return every line in the order of writing; a step that was redone has several."""
    lines = []
    for text in place.read_bytes().splitlines() if place.is_file() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # the line that is being written right now
            continue
    return lines


def read_metrics(place: Place) -> list[dict[str, Any]]:
    """Return one entry a step in order of steps; of a step that was redone, the last."""
    steps = {line["step"]: line for line in read_lines(place)}
    return [steps[step] for step in sorted(steps)]


class Tail:
    """Reads a growing file of lines piece by piece."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._read = 0

    def new(self) -> list[dict[str, Any]]:
        """Return the whole lines that were written since the last call."""
        if not self.place.is_file():
            return []
        with self.place.open() as file:
            file.seek(self._read)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
