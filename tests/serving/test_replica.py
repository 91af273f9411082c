"""The thread between an engine and asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from rayllava.records import Delta, Request, Turn
from serving.replica import EngineThread
from tests.serving.counter import Counter


def ask(id: str, num: int = 3, *, text: str = "count") -> Request:
    return Request(id, (Turn("user", text),), max_new_tokens=num)


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
        return [piece async for piece in EngineThread(Counter()).answer(ask("1", text="long"))]

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
            await text_of(thread, ask("1", text="odd secret"))
        assert thread.death is None
        assert await text_of(thread, ask("next", 1)) == "1 "

    asyncio.run(run())
    assert "KeyError" in caplog.text and "secret" not in caplog.text


def test_a_dead_engine_says_so_to_all_who_listen_and_come() -> None:
    async def run() -> None:
        thread = EngineThread(Counter())
        waiting = asyncio.create_task(text_of(thread, ask("endless", 10**9)))
        for text in ("poison", "too late"):
            with pytest.raises(RuntimeError, match="the engine failed"):
                await text_of(thread, ask(text, text=text))
        with pytest.raises(RuntimeError, match="the engine failed"):
            await waiting
        assert isinstance(thread.death, RuntimeError)

    asyncio.run(run())
