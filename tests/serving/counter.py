"""An engine that counts aloud, a word a step, for tests of what stands around an engine."""

from __future__ import annotations

import time

from rayllava.records import Delta, Request


class Counter:
    def __init__(self, *, step_s: float = 0) -> None:
        self.step_s = step_s
        self.poisoned = False
        self.said: dict[str, int] = {}
        self.most: dict[str, int] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.said)

    def submit(self, request: Request) -> None:
        text = request.turns[-1].text
        if text == "long":
            raise ValueError("too long")
        if text == "odd secret":
            raise KeyError(text)
        self.poisoned = self.poisoned or text == "poison"
        self.said[request.id], self.most[request.id] = 0, request.max_new_tokens

    def cancel(self, id: str, /) -> None:
        self.said.pop(id, None)

    def step(self) -> list[Delta]:
        time.sleep(self.step_s)
        if self.poisoned and max(self.said.values()) > 1:
            raise RuntimeError("the engine's own words")
        deltas = []
        for id_ in list(self.said):
            self.said[id_] += 1
            ended = self.said[id_] == self.most[id_]
            deltas.append(Delta(id_, f"{self.said[id_]} ", self.said[id_], 4, "length" if ended else None))
            if ended:
                del self.said[id_]
        return deltas
