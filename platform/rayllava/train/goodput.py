"""Where the time of a run went.

    goodput = committed steps x undisturbed step time at their world size / wall time with at least MIN nodes there

    wall      from the first attempt's decision to the last step
    waiting   no group, for the cluster had too little room
    useful    steps of the newest count of each, without their waits: as they would take undisturbed
    data      waiting for the stream
    save      held up by checkpoints
    watch     validation and sample answers
    lost      steps that were done again
    restart   all the rest: noticing a loss, starting processes, importing, building the model, the first batch

The undisturbed time of a step is the median of the steps at that world size, an attempt's first one left out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from rayllava.checkpoint.run import decisions
from rayllava.place import Place
from rayllava.train.meter import read_lines

Line = Mapping[str, Any]
"""Of metrics.jsonl."""


class Goodput(NamedTuple):
    """Shares of a run's time, all in seconds but the first."""

    goodput: float
    """0 to 1."""
    wall: float
    waiting: float
    useful: float
    data: float
    save: float
    watch: float
    lost: float
    restart: float
    recoveries: tuple[float, ...] = ()
    """From the last step of an attempt to the end of the first step of the next, waiting apart."""

    def text(self) -> str:
        parts = ("useful", "data", "save", "watch", "lost", "restart", "waiting")
        told = ", ".join(f"{name} {getattr(self, name):.0f}" for name in parts)
        return f"goodput {self.goodput:.1%} of {self.wall:.0f} s: {told}"


def measure(run: Place, lines: list[dict[str, Any]] | None = None) -> Goodput | None:
    """Return the account of a run from its own files, its metrics lines if they are at hand; None before a step."""
    lines = read_lines(run / "metrics.jsonl") if lines is None else lines
    if not lines:
        return None
    waits = [json.loads(place.read_bytes()) for place in (run / "waits").files((".json",))]
    decided = {number: decision.at for number, decision in decisions(run, {}).items()}
    return account(lines, decided, [(wait["from"], wait["to"]) for wait in waits])


def account(lines: list[dict[str, Any]], decided: dict[int, float], waits: list[tuple[float, float]]) -> Goodput:
    """Return the account of metrics lines in the order they were written, attempts' times and waits for nodes."""
    counted = {line["step"]: line for line in lines}
    waiting = sum(end - begin for begin, end in waits)
    spent = spend(lines, counted.values(), start=min(decided.values()), end=lines[-1]["time"], waiting=waiting)
    recoveries = (
        after["time"]
        - before["time"]
        - sum(end - begin for begin, end in waits if before["time"] <= end <= after["time"])
        for before, after in pairwise(lines)
        if before["attempt"] != after["attempt"]
    )
    return spent._replace(recoveries=tuple(recoveries))


def spend(lines: Sequence[Line], counting: Collection[Line], *, start: float, end: float, waiting: float) -> Goodput:
    """Return the account of the time from `start` to `end`, seconds since 1970, of which the steps of `counting` are
    the useful ones; without recoveries."""
    usual = step_times(lines)
    first = {id(line) for line in firsts(lines)}
    counts = {id(line) for line in counting}
    wall = end - start
    useful = sum(usual[line["world_size"]] for line in counting)
    data = sum(line["data_seconds"] for line in counting if id(line) not in first)
    save = sum(line["save_seconds"] for line in counting)
    watch = sum(line.get("watch_seconds", 0.0) for line in counting)
    lost = sum(line["seconds"] for line in lines if id(line) not in counts | first)
    return Goodput(
        goodput=useful / max(1e-9, wall - waiting),
        wall=wall,
        waiting=waiting,
        useful=useful,
        data=data,
        save=save,
        watch=watch,
        lost=lost,
        restart=max(0.0, wall - waiting - useful - data - save - watch - lost),
    )


def firsts(lines: Iterable[Line]) -> list[Line]:
    """Return the first line of each attempt."""
    found: dict[int, Line] = {}
    for line in lines:
        found.setdefault(line["attempt"], line)
    return list(found.values())


def step_times(lines: Sequence[Line]) -> dict[int, float]:
    """Return the undisturbed time of a step at each world size."""
    first = {id(line) for line in firsts(lines)}
    typical: dict[int, list[float]] = defaultdict(list)
    for line in lines:
        if id(line) not in first:
            typical[line["world_size"]].append(_work(line))
    for line in lines:  # a world size of which nothing but first steps is known
        if not typical[line["world_size"]]:
            typical[line["world_size"]].append(_work(line))
    return {size: median(times) for size, times in typical.items()}


def _work(line: Line) -> float:
    return float(line["seconds"] - line["data_seconds"] - line["save_seconds"] - line.get("watch_seconds", 0.0))
