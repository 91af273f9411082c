"""Which nodes are there when: a recorded trace of spot instances, mapped onto the few raylets of one machine.

    file --read--> changes --few--> changes of few nodes --squeezed--> in so many minutes --acts--> what to do when

A line of a file is `milliseconds,add|remove,node[,milliseconds of notice]`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

TAIL_S = 120.0
"""What is played after the last change, so that a recovery from it is seen."""


class Change(NamedTuple):
    """A node comes or goes."""

    at_s: float
    node: str
    joins: bool
    notice_s: float = 0.0
    """How long before it goes a node says so; 0 when it does not."""


class Act(NamedTuple):
    """What is done to the cluster."""

    at_s: float
    kind: Literal["join", "notice", "lose"]
    node: str
    notice_s: float = 0.0
    """Of a notice: how long the node stays. Of a loss: how long before it was announced."""


def read(path: Path) -> list[Change]:
    """Return the changes of a trace in order of time; ValueError that names the line that is none."""
    changes: list[Change] = []
    there: set[str] = set()
    with path.open(newline="") as file:
        for number, fields in enumerate(csv.reader(file), 1):
            try:
                at_ms, kind, node, *rest = fields
                change = Change(
                    int(at_ms) / 1e3, node, {"add": True, "remove": False}[kind], sum(map(int, rest)) / 1e3
                )
            except (ValueError, KeyError):
                wanted = "milliseconds,add|remove,node[,milliseconds of notice]"
                raise ValueError(f"{path} line {number}: {','.join(fields)} is not `{wanted}`") from None
            if changes and change.at_s < changes[-1].at_s:
                raise ValueError(f"{path} line {number}: {at_ms} ms comes before the line above; sort the file")
            if change.joins == (node in there):
                told = "is there already" if change.joins else "is not there"
                raise ValueError(f"{path} line {number}: {node} {told}; correct the file")
            there ^= {node}
            changes.append(change)
    if not changes:
        raise ValueError(f"{path} holds no change; give a trace of `milliseconds,add|remove,node` lines")
    return changes


def few(changes: list[Change], *, most: int = 4) -> list[Change]:
    """Return a trace of at most `most` nodes; one that never has more is returned as it is.

    Of a larger one each node stands for as many instances, and comes or goes once their number is so many away
    from what the nodes stand for. At least one stays; the one that has been there longest goes first.
    """
    counts: list[tuple[float, int]] = []
    there = 0
    for at_s, together in groupby(changes, key=lambda change: change.at_s):
        there += sum(1 if change.joins else -1 for change in together)
        counts.append((at_s, there))
    each = -(-max(count for _, count in counts) // most)
    if each == 1:
        return changes
    found: list[Change] = []
    nodes: list[str] = []
    made = 0
    for at_s, count in counts:
        wanted = min(most, max(1, round(count / each)))
        if nodes and abs(count - each * len(nodes)) < each:
            continue
        while len(nodes) > wanted:
            found.append(Change(at_s, nodes.pop(0), joins=False))
        while len(nodes) < wanted:
            made += 1
            nodes.append(f"node{made}")
            found.append(Change(at_s, nodes[-1], joins=True))
    return found


def squeezed(changes: list[Change], minutes: float) -> list[Change]:
    """Return the same changes so close together that all of them, and the tail, take `minutes`."""
    room = 60 * minutes - TAIL_S
    if room <= 0:
        raise ValueError(f"--minutes {minutes:g} leaves no time for the trace; give more than {TAIL_S / 60:g}")
    pace = room / changes[-1].at_s if changes[-1].at_s else 1.0
    return [change._replace(at_s=change.at_s * pace, notice_s=change.notice_s * pace) for change in changes]


def acts(changes: Iterable[Change]) -> list[Act]:
    """Return what is to be done, in order of time."""
    found = []
    for change in changes:
        if change.joins:
            found.append(Act(change.at_s, "join", change.node))
            continue
        if change.notice_s:
            found.append(Act(max(0.0, change.at_s - change.notice_s), "notice", change.node, change.notice_s))
        found.append(Act(change.at_s, "lose", change.node, change.notice_s))
    return sorted(found, key=lambda act: act.at_s)
