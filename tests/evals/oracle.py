"""An engine without a model: its answer is a function of the question, its troubles are asked for."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from rayllava.records import Delta, Finish, Request


def right_answer(text: str, images: tuple[bytes, ...]) -> str:
    """Say yes to an even thing, if a picture came along."""
    number = next(int(word) for word in text.split() if word.isdigit())
    return "Yes" if number % 2 == 0 and images else "No"


@dataclass(frozen=True)
class Oracle:
    """Answers pairs of requests, a letter of each in turn, as an engine with two slots would."""

    seen: str = ""
    """Folder that gets a file for every request answered, named for the process."""
    kills: str = ""
    """Text of a question that kills the process."""
    kills_again: bool = False
    """Kill every process that gets the question, not the first alone."""
    fails: str = ""
    """Text of a question at which our own code fails."""
    aborts: str = ""
    """Text of a question that the engine gives up."""
    seconds: float = 0

    def generate(self, requests: Iterable[Request]) -> Iterator[Delta]:
        slots: list[Request] = []
        for request in requests:
            slots.append(request)
            if len(slots) == 2:
                yield from self._turns(slots)
                slots = []
        yield from self._turns(slots)

    def _turns(self, slots: list[Request]) -> Iterator[Delta]:
        for letters in zip_longest(*(self._letters(request) for request in slots)):
            yield from filter(None, letters)

    def _letters(self, request: Request) -> Iterator[Delta]:
        text = request.turns[0].text
        self._suffer(text)
        time.sleep(self.seconds)
        answer = right_answer(text, request.images)
        finish: Finish = "abort" if self.aborts and self.aborts in text else "stop"
        for place, letter in enumerate(answer, 1):
            yield Delta(request.id, letter, place, 10, finish if place == len(answer) else None)
        if self.seen:
            (Path(self.seen) / f"{request.id.replace('/', '_')}.{os.getpid()}").touch()

    def _suffer(self, text: str) -> None:
        if self.fails and self.fails in text:
            raise RuntimeError("out of cheese")
        marker = Path(self.seen) / "killed"
        if self.kills and self.kills in text and (self.kills_again or not marker.exists()):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
