"""N engines in Ray actors that answer chunks of questions and are replaced when they die.

    pull() -> Chunk --to an idle engine--> load once, generate --streamed back--> (chunk's key, Prediction)

Chunks are pulled, so a slow engine takes fewer. What a dead engine left unanswered goes to another one.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from rayllava.evals.run import predict
from rayllava.records import Delta, Prediction, Question, Request

log = logging.getLogger(__name__)

MAX_DEATHS = 3
"""Engines that one chunk, or loading, may cost. Announced preemptions do not count."""


class Engine(Protocol):
    def generate(self, requests: Iterable[Request]) -> Iterator[Delta]: ...


Load = Callable[[], Engine]
"""Runs in the actor; imports what it needs there."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Questions that go to one engine together."""

    key: str
    """Of the benchmark."""
    questions: tuple[Question, ...]
    num_deaths: int = 0


class Fleet:
    """Engines that live as long as the `with` block."""

    def __init__(self, load: Load, *, num_engines: int, num_cpus: float, num_gpus: float = 0) -> None:
        self.load = load
        self.num_engines = num_engines
        self.options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_restarts": 0}
        self.members: list[_Member] = []
        self._num_load_deaths = 0
        self._lost: deque[Chunk] = deque()
        self._failed: set[str] = set()

    def ask(self, pull: Callable[[], Chunk | None]) -> Iterator[tuple[str, Prediction | Exception]]:
        """Yield an answer to every question of every chunk until `pull` returns None.

        An exception instead of an answer says that the benchmark of this key has failed: its error came from
        the engine's code, or its questions killed MAX_DEATHS engines. Nothing of it is asked again.
        """
        import ray

        chunk = self._next(pull)
        if chunk is None:
            return
        self._start(self.num_engines)
        waiting_since = time.monotonic()
        while True:
            # One chunk is always at hand, its pictures read, before an engine falls idle.
            for member in self.members:
                chunk = chunk or self._next(pull)
                if chunk and member.idle:
                    member.ask(chunk)
                    chunk = None
            if chunk is None and not any(member.chunk for member in self.members):
                return
            awaited = {member.awaited: member for member in self.members if member.awaited is not None}
            ready, _ = ray.wait(list(awaited), num_returns=1, timeout=30)
            if ready:  # the others that are ready too: nobody starves behind a chatty neighbour
                ready, _ = ray.wait(list(awaited), num_returns=len(awaited), timeout=0)
            elif not any(member.loaded for member in self.members):
                seconds = time.monotonic() - waiting_since
                log.warning("no engine is ready after %.0f s; each needs %s", seconds, self.options)
            for event in ready:
                yield from self._take(awaited[event])

    def _take(self, member: _Member) -> Iterator[tuple[str, Prediction | Exception]]:
        """Yield what one event of a member means."""
        import ray.exceptions

        chunk = member.chunk
        try:
            prediction = member.take()
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if chunk is None:  # it could not load, and no other engine would
                raise cause from error
            self._replace(member)
            self._failed.add(chunk.key)
            yield chunk.key, cause
        except ray.exceptions.RayError as error:
            self._replace(member)
            counts = not getattr(error, "preempted", False)
            if chunk is None:
                self._num_load_deaths += counts
                if self._num_load_deaths >= MAX_DEATHS:
                    raise ValueError(
                        f"{MAX_DEATHS} engines died while loading the model; "
                        "give them more memory, quant=nf4, or fewer engines"
                    ) from error
                return
            chunk = Chunk(chunk.key, tuple(member.unanswered.values()), chunk.num_deaths + counts)
            log.warning("an engine died; asking its %d open questions again", len(chunk.questions))
            if chunk.num_deaths >= MAX_DEATHS:
                self._failed.add(chunk.key)
                first = chunk.questions[0].id if chunk.questions else "none"
                yield chunk.key, ValueError(f"{MAX_DEATHS} engines died on the same questions, {first} first")
            elif chunk.questions:
                self._lost.append(chunk)
        else:
            if prediction is not None:
                assert chunk is not None
                yield chunk.key, prediction
            elif chunk is None:
                self._num_load_deaths = 0

    def _next(self, pull: Callable[[], Chunk | None]) -> Chunk | None:
        while self._lost:
            chunk = self._lost.popleft()
            if chunk.key not in self._failed:
                return chunk
        return pull()

    def _start(self, num: int) -> None:
        import ray

        actor = ray.remote(_Actor).options(**self.options)
        for _ in range(num):
            self.members.append(_Member(actor.remote(), self.load))

    def _replace(self, member: _Member) -> None:
        self.members.remove(member)
        member.kill()
        self._start(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self.members:
            member.kill()


@dataclass(eq=False)
class _Member:
    """The driver's side of one engine: loading, idle, or busy with a chunk."""

    actor: Any
    load: Load
    chunk: Chunk | None = None
    unanswered: dict[str, Question] = field(default_factory=dict)
    loaded: bool = False
    awaited: Any = None
    """The event that comes next: the end of loading, or a stream of predictions."""

    def __post_init__(self) -> None:
        self.awaited = self.actor.load.remote(self.load)

    @property
    def idle(self) -> bool:
        return self.loaded and self.chunk is None

    def ask(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.unanswered = {question.id: question for question in chunk.questions}
        self.awaited = self.actor.ask.remote(chunk.questions)

    def take(self) -> Prediction | None:
        """Return the answer that is ready; None when loading, or the chunk, has ended."""
        import ray

        if not self.loaded:
            ray.get(self.awaited)
            self.loaded, self.awaited = True, None
            return None
        try:
            prediction: Prediction = ray.get(next(self.awaited))
        except StopIteration:
            self.chunk = self.awaited = None
            return None
        del self.unanswered[prediction.id]
        return prediction

    def kill(self) -> None:
        import ray

        ray.kill(self.actor)


class _Actor:
    """The engine's side, in a process of its own."""

    def load(self, load: Load) -> None:
        self.engine = load()

    def ask(self, questions: tuple[Question, ...]) -> Iterator[Prediction]:
        yield from predict(questions, self.engine.generate)
