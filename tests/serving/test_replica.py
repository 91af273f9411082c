"""The thread between an engine and asyncio. The engine here counts aloud, a word a step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from rayllava.records import Delta, Request, Turn
from serving.replica import EngineThread


class Counter:
    def __init__(self) -> None:
        self.said: dict[str, int] = {}
        self.most: dict[str, int] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.said)

    def submit(self, request: Request) -> None:
        if request.id == "long":
            raise ValueError("too long")
        if request.id == "odd":
            raise KeyError(request.turns[0].text)
        self.said[request.id], self.most[request.id] = 0, request.max_new_tokens

    def cancel(self, id: str, /) -> None:
        self.said.pop(id, None)

    def step(self) -> list[Delta]:
        if "poison" in self.said:
            raise RuntimeError("secret")
        deltas = []
        for id_ in list(self.said):
            self.said[id_] += 1
            ended = self.said[id_] == self.most[id_]
            deltas.append(Delta(id_, f"{self.said[id_]} ", self.said[id_], 4, "length" if ended else None))
            if ended:
                del self.said[id_]
        return deltas


def ask(id: str, num: int = 3) -> Request:
    return Request(id, (Turn("user", "count"),), max_new_tokens=num)


async def text_of(thread: EngineThread, request: Request) -> str:
    pieces = thread.answer(request)
    assert await anext(pieces) == ""
    return "".join([delta.text async for piece in pieces for delta in piece if isinstance(delta, Delta)])


async def until(true: Callable[[], bool]) -> None:
    for _ in range(500):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come true")


def test_concurrent_listeners_hear_their_own_answers() -> None:
    async def run() -> list[str]:
        thread = EngineThread(Counter())
        return await asyncio.gather(*(text_of(thread, ask(str(num), num)) for num in range(1, 20)))

    assert asyncio.run(run()) == ["".join(f"{n} " for n in range(1, num + 1)) for num in range(1, 20)]


def test_a_refusal_is_the_first_and_only_word() -> None:
    async def run() -> list[object]:
        return [piece async for piece in EngineThread(Counter()).answer(ask("long"))]

    assert asyncio.run(run()) == ["too long"]


def test_who_stops_listening_is_cancelled() -> None:
    async def run() -> None:
        engine = Counter()
        thread = EngineThread(engine)
        task = asyncio.create_task(text_of(thread, ask("endless", 10**9)))
        await until(lambda: engine.has_work)
        assert thread.num_open == 1
        task.cancel()
        await until(lambda: not engine.has_work and thread.num_open == 0)
        assert await text_of(thread, ask("next", 1)) == "1 "

    asyncio.run(run())


def test_a_request_that_breaks_submit_breaks_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        thread = EngineThread(Counter())
        with pytest.raises(RuntimeError, match=r"the engine failed \(KeyError\)"):
            await text_of(thread, ask("odd"))
        assert thread.death is None
        assert await text_of(thread, ask("next", 1)) == "1 "

    asyncio.run(run())
    assert "KeyError" in caplog.text and "count" not in caplog.text.replace("test_replica", "")


def test_a_dead_engine_says_so_to_all_who_listen_and_come() -> None:
    async def run() -> None:
        thread = EngineThread(Counter())
        waiting = asyncio.create_task(text_of(thread, ask("endless", 10**9)))
        for id_ in ("poison", "late"):
            with pytest.raises(RuntimeError, match="the engine failed"):
                await text_of(thread, ask(id_))
        with pytest.raises(RuntimeError, match="the engine failed"):
            await waiting
        assert isinstance(thread.death, RuntimeError)

    asyncio.run(run())
