"""JSON of any size, value by value: an array, or one object a line.

The text slides through a buffer. What does not parse is either cut off by the buffer's end, and then more is
read and it is parsed again, or wrong.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from rayllava.data.sources._file import head
from rayllava.place import Place

CHUNK = 1 << 20
"""Bytes read at once; more where one record is longer."""

LONGEST = 64 << 20
"""Most characters of one record, and bytes of a file that is read whole."""

_SLACK = 16
"""An error so near to the end of the buffer may be the end's: a number, literal or escape is cut off there."""

_BLANKS = re.compile(r"[ \t\n\r]*")


def rows(annotations: Place) -> Iterator[tuple[int, Any]]:
    """Yield (1-based place in an array, value) or (1-based line that it begins on, value)."""
    begin = head(annotations, kind="JSON")
    if begin[:1] not in b"[{":
        raise ValueError(
            f"annotations={annotations} is malformed JSON at line 1 column 1: it is neither an array of "
            "records nor one record a line"
        )
    with annotations.open() as file:
        text = _Text(annotations, file)
        yield from _array(text) if begin[:1] == b"[" else _lines(text)


def document(annotations: Place) -> Any:
    """Return the one value of a small file; a key that stands twice in an object is an error."""
    head(annotations, kind="JSON")
    if (size := annotations.size()) > LONGEST:
        raise ValueError(f"annotations={annotations} takes {size >> 20} MiB; a mixture is a small file")
    try:
        return json.loads(annotations.read_bytes().decode("utf-8-sig"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise _not_text(annotations, error) from error
    except json.JSONDecodeError as error:
        raise _malformed(annotations, error.lineno, error.colno, error.msg) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"annotations={annotations}: {error}; mend it there") from error


def _array(text: _Text) -> Iterator[tuple[int, Any]]:
    text.peek()
    text.at += 1
    place = 0
    mark = "," if text.peek() != "]" else "]"
    while mark == ",":
        place += 1
        yield place, text.value()
        mark = text.peek()
        if mark not in (",", "]"):
            raise text.malformed("Expecting ',' delimiter", text.at)
        if mark == ",":
            text.at += 1
            text.peek()
    text.at += 1
    if text.peek():
        raise text.malformed("Extra data", text.at)


def _lines(text: _Text) -> Iterator[tuple[int, Any]]:
    while text.peek():
        line = text.line(text.at)
        yield line, text.value()
        end = text.line(text.at)
        if text.peek() and text.line(text.at) == end:
            raise text.malformed("Extra data", text.at)


class _Text:
    """The part of a file that is being parsed, and how far the parser is."""

    def __init__(self, annotations: Place, file: BinaryIO) -> None:
        self.annotations, self.file = annotations, file
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.parse = json.JSONDecoder().raw_decode
        self.buffer, self.at, self.ended = "", 0, False
        self.dropped = 0  # characters before the buffer
        self.counted = 0  # the lines of the buffer are counted up to here
        self.num_breaks, self.begin = 0, 0  # line breaks so far, and characters before the line they lead to

    def peek(self) -> str:
        """Skip blanks and return the character behind them; empty at the end of the file."""
        while True:
            blanks = _BLANKS.match(self.buffer, self.at)
            assert blanks, "nothing is blank too"
            self.at = blanks.end()
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """Return the value that begins here and step behind it."""
        while True:
            try:
                value, end = self.parse(self.buffer, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos + _SLACK > len(self.buffer)
                if not (cut and self._more()):
                    raise self.malformed(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:  # a number of too many digits, too many brackets
                if isinstance(error, RecursionError) or not self._more():
                    raise self.malformed(str(error), self.at) from error
            else:
                # Right at the border a number may go on behind it.
                if end + _SLACK <= len(self.buffer) or not self._more():
                    self.at = end
                    return value

    def line(self, at: int) -> int:
        """Return the 1-based line of a place in the buffer that is not before the last one asked for."""
        if breaks := self.buffer.count("\n", self.counted, at):
            self.num_breaks += breaks
            self.begin = self.dropped + self.buffer.rfind("\n", self.counted, at) + 1
        self.counted = at
        return self.num_breaks + 1

    def malformed(self, what: str, at: int) -> ValueError:
        line = self.line(at)
        return _malformed(self.annotations, line, self.dropped + at - self.begin + 1, what)

    def _more(self) -> bool:
        """Forget what was parsed and read on; False at the end of the file."""
        left = len(self.buffer) - self.at
        if left > LONGEST:
            raise self.malformed(f"the record is longer than {LONGEST >> 20} MiB", self.at)
        text = ""
        while not text and not self.ended:
            # As much again as there is: parsing anew from the start of a long record stays cheap.
            content = self.file.read(max(CHUNK, left))
            self.ended = not content
            try:
                text = self.decode(content, final=self.ended)
            except UnicodeDecodeError as error:
                raise _not_text(self.annotations, error) from error
        if not text:
            return False
        self.line(self.at)
        self.buffer = self.buffer[self.at :] + text
        self.dropped += self.at
        self.at = self.counted = 0
        return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"{key!r} stands twice in one object")
        made[key] = value
    return made


def _malformed(annotations: Place, line: int, column: int, what: str) -> ValueError:
    return ValueError(
        f"annotations={annotations} is malformed JSON at line {line} column {column}: {what}; "
        "download it again or mend it there"
    )


def _not_text(annotations: Place, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"annotations={annotations} is not UTF-8 text ({error.reason}); download it again")
