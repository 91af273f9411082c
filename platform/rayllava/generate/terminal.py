"""A dialogue on a terminal: lines go in, pieces of text come out.

a question        asked, with the pictures that were given before it
/image FILE       a picture for the next question: a file, a data: URL, an https: address of an allowed host
/regen            the last question again
/reset            forgets the dialogue and its pictures
/system TEXT      begins anew under another system text; none: the template's own
/save FILE        writes the dialogue as JSON
/help, /quit
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path

from rayllava import durable
from rayllava.fetch.address import read_image
from rayllava.fetch.images import Rules, check_image
from rayllava.fetch.remote import Hosts, fetch
from rayllava.generate.ask import Ask
from rayllava.records import IMAGE_MARK, Turn

HELP = "\n".join(line.strip() for line in (__doc__ or "").splitlines()[2:] if line.strip()) + "\n"


_RULES = Rules()
NOWHERE = Hosts()
"""No host is allowed."""


def picture(name: str, hosts: Hosts = NOWHERE) -> bytes:
    """Return the picture in a file, a data: URL, or at an https: address of one of `hosts`.

    Raises ValueError when it is none, or may not be read.
    """
    if name.startswith("data:"):
        return read_image(name, _RULES)
    if "://" in name:
        return fetch(name, _RULES, hosts)
    try:
        content = Path(name).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"image={name} cannot be read ({error.strerror}); give a file") from error
    try:
        check_image(content, _RULES)
    except ValueError as error:
        raise ValueError(f"image={name}: {error}") from error
    return content


class Chat:
    """What was said so far, and to whom."""

    def __init__(self, ask: Ask, *, system: str = "", hosts: Hosts = NOWHERE) -> None:
        self.ask, self.hosts = ask, hosts
        self.over = False
        self._begin(system)

    def put(self, picture: bytes) -> None:
        """Take a picture for the next question; ValueError when the dialogue has as many as it can."""
        if len(self.pictures) + len(self.waiting) >= _RULES.max_images:
            raise ValueError(f"the dialogue has {_RULES.max_images} pictures; /reset begins a new one")
        self.waiting.append(picture)

    def take(self, line: str) -> Iterator[str]:
        """Yield what a line is answered with; ValueError when it asks for what cannot be."""
        command, _, rest = line.strip().partition(" ")
        if not command.startswith("/"):
            if command:
                yield from self._question(line.strip())
            return
        said = self._commands().get(command)
        if said is None:
            raise ValueError(f"{command} is no command; /help lists them")
        yield from said(rest.strip())

    def _commands(self) -> dict[str, Callable[[str], Iterator[str]]]:
        return {
            "/image": self._image,
            "/regen": self._regen,
            "/reset": lambda _: self._begin(self.system),
            "/system": self._begin,
            "/save": self._save,
            "/help": lambda _: iter((HELP,)),
            "/quit": self._quit,
        }

    def _begin(self, system: str) -> Iterator[str]:
        self.system = system
        self.turns: tuple[Turn, ...] = (Turn("system", system),) if system else ()
        self.pictures: tuple[bytes, ...] = ()
        self.waiting: list[bytes] = []
        return iter(())

    def _question(self, text: str) -> Iterator[str]:
        marks = f"{IMAGE_MARK}\n" * len(self.waiting)
        turns = (*self.turns, Turn("user", marks + text.replace(IMAGE_MARK, "")))
        yield from self._answer(turns, (*self.pictures, *self.waiting))
        self.waiting = []

    def _answer(self, turns: tuple[Turn, ...], pictures: tuple[bytes, ...]) -> Iterator[str]:
        """Yield an answer; the dialogue goes on from it, or stays as it was if there is none."""
        answer = ""
        for piece in self.ask(turns, pictures):
            answer += piece
            yield piece
        self.turns, self.pictures = (*turns, Turn("assistant", answer)), pictures
        yield "\n"

    def _image(self, name: str) -> Iterator[str]:
        self.put(picture(name, self.hosts))
        yield f"{len(self.waiting)} for the next question\n"

    def _regen(self, _: str) -> Iterator[str]:
        if not self.turns or self.turns[-1].role != "assistant":
            raise ValueError("there is no answer to give again; ask something")
        yield from self._answer(self.turns[:-1], self.pictures)

    def _save(self, name: str) -> Iterator[str]:
        if not name:
            raise ValueError("/save wants a file")
        pictures = [base64.b64encode(picture).decode() for picture in self.pictures]
        turns = [{"role": turn.role, "content": turn.text} for turn in self.turns]
        durable.write_json(Path(name).expanduser(), {"turns": turns, "images": pictures})
        yield f"saved to {name}\n"

    def _quit(self, _: str) -> Iterator[str]:
        self.over = True
        return iter(())
