"""An engine in a thread of its own, and the Serve deployment around it.

    answer(request) --inbox--> [thread: submit, cancel, step, step, ...] --news--> a queue for each request

The thread alone touches the engine; asyncio alone waits. Whoever stops listening frees its place in the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import traceback
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Protocol

from ray import serve

from rayllava import log as log_
from rayllava.records import Delta, Request

log = logging.getLogger("ray.serve")

DRAIN_S = 300.0
"""How long a replica that is to stop may finish its answers; a pod's grace must be longer."""


class Engine(Protocol):
    """What `rayllava.generate` gives; a thread at a time."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, id: str, /) -> None: ...
    def step(self) -> list[Delta]: ...


Load = Callable[[], Engine]
"""Runs in the replica; imports what it needs there."""


@dataclass(frozen=True)
class _Listener:
    """Where the news about one request go: deltas, a reason why there will be none, or the engine's death."""

    request: Request
    loop: asyncio.AbstractEventLoop
    news: asyncio.Queue[Delta | str | Exception] = field(default_factory=asyncio.Queue)

    def tell(self, news: Delta | str | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and who listened is gone with it
            self.loop.call_soon_threadsafe(self.news.put_nowait, news)

    async def hear(self) -> Delta | str:
        news = await self.news.get()
        if isinstance(news, Exception):
            raise RuntimeError(f"the engine failed ({type(news).__name__})")
        return news


class EngineThread:
    """Runs an engine for any number of concurrent listeners."""

    def __init__(self, engine: Engine) -> None:
        self.death: Exception | None = None
        """What ended the engine; nothing is answered any more."""
        self.num_open = 0
        """Requests that are waiting or being answered."""
        self._engine = engine
        self._inbox: queue.SimpleQueue[_Listener | str] = queue.SimpleQueue()
        self._listeners: dict[str, _Listener] = {}
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    async def answer(self, request: Request) -> AsyncGenerator[str | list[Delta], None]:
        """Yield first "" or the reason for a refusal, then pieces as they come, the last one with its finish."""
        listener = _Listener(request, asyncio.get_running_loop())
        self._inbox.put(listener)
        self.num_open += 1
        try:
            reason = await listener.hear()
            assert isinstance(reason, str), f"{reason} came before the admission"
            yield reason
            ended = reason != ""
            while not ended:
                pieces = [await listener.hear()]
                while not listener.news.empty():  # a slow reader gets more at a time
                    pieces.append(await listener.hear())
                deltas = [piece for piece in pieces if isinstance(piece, Delta)]
                ended = deltas[-1].finish is not None
                yield deltas
        finally:
            self.num_open -= 1
            self._inbox.put(request.id)  # of no effect when the answer has ended

    def _run(self) -> None:
        try:
            while True:
                self._read_inbox()
                for delta in self._engine.step():
                    self._tell(delta)
        except Exception as error:
            log.error("the engine died with %d open requests: %s", len(self._listeners), _without_words(error))
            self.death = error
        for listener in self._listeners.values():
            listener.tell(self.death)
        while True:  # until the replica is replaced
            item = self._inbox.get()
            if isinstance(item, _Listener):
                item.tell(self.death)

    def _read_inbox(self) -> None:
        """Take in all that has arrived; wait for it when there is nothing else to do."""
        item = None if self._engine.has_work else self._inbox.get()
        while True:
            if isinstance(item, _Listener):
                self._submit(item)
            elif item is not None and item in self._listeners:
                del self._listeners[item]
                self._engine.cancel(item)
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                return

    def _submit(self, listener: _Listener) -> None:
        try:
            self._engine.submit(listener.request)
        except ValueError as error:
            listener.tell(str(error))
        except Exception as error:  # the fence around one request: nothing was queued, the others go on
            log.error("a request could not be submitted: %s", _without_words(error))
            listener.tell(error)
        else:
            self._listeners[listener.request.id] = listener
            listener.tell("")

    def _tell(self, delta: Delta) -> None:
        listener = self._listeners.get(delta.id)
        if listener:  # else it was cancelled, and this is the engine's last word about it
            listener.tell(delta)
            if delta.finish:
                del self._listeners[delta.id]


def _without_words(error: Exception) -> str:
    """Return where an error came from; what it says may quote a request."""
    return type(error).__name__ + "\n" + "".join(traceback.format_tb(error.__traceback__))


@serve.deployment(name="Engine", graceful_shutdown_timeout_s=DRAIN_S, health_check_period_s=2)
class EngineReplica:
    """One engine with its weights."""

    def __init__(self, load: Load) -> None:
        log_.start()
        self._thread = EngineThread(load())

    async def answer(self, request: Request) -> AsyncGenerator[str | list[Delta], None]:
        async with contextlib.aclosing(self._thread.answer(request)) as pieces:
            async for piece in pieces:
                yield piece

    async def num_open(self) -> int:
        """Return how many requests are waiting or being answered; an engine that is dead answers with an error."""
        self.check_health()
        return self._thread.num_open

    def check_health(self) -> None:
        """Raise when the engine is dead, so that Serve replaces this replica."""
        if self._thread.death:
            raise RuntimeError("the engine died") from self._thread.death
