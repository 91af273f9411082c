"""What a contender got out of a trace, from what it wrote down: one rule for all of them.

    lines       a line a step, as RUN/metrics.jsonl has them: step, time, attempt, world_size, seconds, ...
    cursors     the step each attempt went on from
    committed   the step of the last checkpoint

A step counts if no later attempt went on from before it and a checkpoint holds it: what a model kept of the work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from benchmarks.availability import Act
from rayllava.train.goodput import Line

_SLACK_S = 3.0
"""A worker may live and compute for so long after its node was killed."""


def kept(lines: Iterable[Line], cursors: Mapping[int, int], committed: int) -> list[Line]:
    """Return the lines of the steps that count."""
    bounds, bound = {}, committed
    for attempt in sorted(cursors, reverse=True):
        bounds[attempt] = bound
        bound = min(bound, cursors[attempt])
    return [line for line in lines if line["step"] <= bounds[line["attempt"]]]


def without_nodes(done: Iterable[tuple[float, Act]], *, least: int, end: float) -> float:
    """Return for how many seconds fewer than `least` nodes were there; `done` has the time of each act."""
    there, since, total = 0, 0.0, 0.0
    for at, act in [*done, (end, Act(0, "notice", ""))]:
        if since and there < least:
            total += at - since
        there += {"join": 1, "notice": 0, "lose": -1}[act.kind]
        since = at
    return total


class Counted(NamedTuple):
    """Samples in steps that count."""

    useful: int
    """Different (sample, epoch)."""
    computed: int
    epochs: int
    """Finished: a step of a later one counts."""
    lost: int
    """Of the finished epochs, (sample, epoch) that were never computed."""
    doubled: int
    """Of the finished epochs, how many times a (sample, epoch) was computed again."""


def count(steps: Iterable[tuple[int, Sequence[str]]], *, num_samples: int) -> Counted:
    """Count the samples of steps, each an epoch and its samples' keys; `num_samples` is the size of an epoch."""
    times: dict[int, Counter[str]] = {}
    for epoch, keys in steps:
        times.setdefault(epoch, Counter()).update(keys)
    finished = [times[epoch] for epoch in sorted(times)[:-1]]
    return Counted(
        useful=sum(map(len, times.values())),
        computed=sum(counter.total() for counter in times.values()),
        epochs=len(finished),
        lost=sum(num_samples - len(counter) for counter in finished),
        doubled=sum(counter.total() - len(counter) for counter in finished),
    )


class Recovery(NamedTuple):
    """One change of the group: why, and how long no step was done, in seconds."""

    kind: Literal["loss", "announced loss", "join", "none"]
    attempt: int
    """That came after."""
    world_size: int
    first: float
    """To the end of the first step of the new group: from an unannounced loss, or from the last step before."""
    beyond: float | None
    """To the end of the first step that had not been done before; None when there was none."""
    parts: dict[str, float]
    """Of `first`. begun: noticing, the end of the old group, new processes up to the training function; decided: the
    attempt's decision, ours alone; ready: imports, model, optimizer, checkpoint; batch: the first rows; step."""
    redone: int
    """Steps that the new group did again."""


def recoveries(
    lines: Sequence[Line], done: Sequence[tuple[float, Act]], decided: Mapping[int, float] | None = None
) -> list[Recovery]:
    """Return every change of the group, and the act that made it: of two, the loss; of acts before, the last."""
    found = []
    used: set[int] = set()
    for before, after in pairwise(lines):
        if before["attempt"] == after["attempt"]:
            continue
        number, kind = _cause(done, before["time"], after["time"], used)
        origin = done[number][0] if kind == "loss" else before["time"]
        if kind != "none":  # a node's notice and its end are one cause
            name = done[number][1].node
            used |= {n for n, (_, act) in enumerate(done) if act.node == name and (n == number or act.notice_s)}
        top = max(line["step"] for line in lines if line["time"] <= before["time"])
        new = next((line for line in lines if line["time"] >= after["time"] and line["step"] > top), None)
        found.append(
            Recovery(
                kind=kind,
                attempt=after["attempt"],
                world_size=after["world_size"],
                first=after["time"] - origin,
                beyond=new["time"] - origin if new else None,
                parts=_parts(after, origin, (decided or {}).get(after["attempt"])),
                redone=top + 1 - after["step"],
            )
        )
    return found


def _cause(
    done: Sequence[tuple[float, Act]], last: float, first: float, used: set[int]
) -> tuple[int, Literal["loss", "announced loss", "join", "none"]]:
    """Return the number of the act that made the group change between two steps, and what it was."""
    earlier = [number for number, (at, _) in enumerate(done) if at <= first and number not in used]
    for number in earlier:
        at, act = done[number]
        if act.kind == "lose" and not act.notice_s and at > last - _SLACK_S:
            return number, "loss"
    for number in reversed(earlier):
        act = done[number][1]
        if act.kind == "join" and act.at_s > 0:
            return number, "join"
        if act.notice_s:
            return number, "announced loss"
    return -1, "none"


def _parts(line: Line, origin: float, decided: float | None) -> dict[str, float]:
    started = line["started"]
    times = {"begun": started["worker"], "decided": decided, "ready": started["engine"]}
    times |= {"batch": line["time"] - line["seconds"] + line["data_seconds"], "step": line["time"]}
    parts, since = {}, origin
    for name, at in times.items():
        if at is not None:
            parts[name], since = at - since, at
    return parts


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return number, median, 95th percentile and maximum."""
    if not values:
        return {"num": 0}
    p50, p95 = (float(np.percentile(values, share)) for share in (50, 95))
    return {"num": len(values), "p50": p50, "p95": p95, "max": float(max(values))}
