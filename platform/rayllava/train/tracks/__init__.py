"""Where a run's numbers go beside its own files: a file a tracker, with one constant `PLUG = Tracker(...)`.

    RUN/metrics.jsonl, RUN/watch.jsonl --Follower--> Track: TensorBoard, W&B, MLflow
    RUN/<tracker>/position.json        how much of both files a track has

A track is derived: whatever it lacks, or has too much of after a step was done again, follows from the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

from rayllava.checkpoint.run import RunManifest
from rayllava.place import Place
from rayllava.shelf import Shelf

Line = dict[str, Any]

_SCALARS = ("loss", "lr", "grad_norm", "seconds", "world_size", "epoch", "tokens_per_second", "mfu")
"""Fields of a metrics line that a track gets, where the line has them."""


class Track(Protocol):
    """An open track."""

    id: str
    """What it is opened by again, empty where its folder says all."""
    rewinds: bool
    """Whether `back` works. Where it does not, a step that was done again is told of as it was the first time."""

    def back(self, step: int) -> None:
        """Forget this step and all later ones: they come again, or for the first time in a session."""

    def scalars(self, step: int, values: dict[str, float], *, at: float) -> None:
        """Take numbers of a step; `at` is when they were measured, in seconds since 1970."""

    def text(self, step: int, markdown: str, *, at: float) -> None:
        """Take the sample answers of a step."""

    def flush(self) -> None:
        """Make what was taken last."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Tracker:
    """How a track is opened."""

    open: Callable[[Place, RunManifest, str], Track]
    """(the track's folder in RUN, the run, the id it had before or "")"""
    package: str
    """What it needs."""
    extra: str = ""
    """Of this project's extras, the one that brings the package; empty where it is always there."""


TRACKERS: Shelf[Tracker] = Shelf("rayllava.train.tracks", Tracker)


def check(names: tuple[str, ...]) -> None:
    """Raise LookupError for a tracker that there is not, ValueError for one whose package is not installed."""
    for name in names:
        plug = TRACKERS[name]
        if find_spec(plug.package) is None:
            raise ValueError(f"track={name} needs the package {plug.package}; pip install 'rayllava[{plug.extra}]'")


class Follower:
    """Keeps one track level with a run's lines."""

    def __init__(self, name: str, run: Place, manifest: RunManifest) -> None:
        folder = run / name
        self._position = folder / "position.json"
        known = json.loads(self._position.read_bytes()) if self._position.is_file() else {}
        self._num_lines = known.get("lines", 0)
        self._num_looks = known.get("looks", 0)
        self._track = TRACKERS[name].open(folder, manifest, known.get("id", ""))
        self._save()  # a track that has an id gets it here
        self._reached: int | None = None
        """The last step that the track has, as far as this session knows."""

    def follow(self, lines: list[Line], looks: list[Line]) -> None:
        """Take over what is new in all lines so far, in the order they were written."""
        before = self._num_lines, self._num_looks
        if not self._track.rewinds:
            self._reached = max((line["step"] for line in lines[: self._num_lines]), default=0)
        for line in lines[self._num_lines :]:
            self._take(line)
            self._num_lines += 1
        # A look stands in its file before the line of its step, and may not overtake it: going back would lose it.
        attempt, step = (lines[-1]["attempt"], lines[-1]["step"]) if lines else (0, 0)
        for look in looks[self._num_looks :]:
            if (look["attempt"], look["step"]) > (attempt, step):
                break
            self._take_look(look, lines, looks[: self._num_looks])
            self._num_looks += 1
        if before != (self._num_lines, self._num_looks):
            self._track.flush()
            self._save()

    def close(self) -> None:
        self._track.close()

    def _save(self) -> None:
        state = {"lines": self._num_lines, "looks": self._num_looks, "id": self._track.id}
        self._position.write_bytes(json.dumps(state).encode() + b"\n")

    def _take(self, line: Line) -> None:
        step = line["step"]
        if self._reached is None or step <= self._reached:
            if not self._track.rewinds:
                return
            self._track.back(step)
        self._reached = step
        self._track.scalars(step, scalars(line), at=line["time"])

    def _take_look(self, look: Line, lines: list[Line], before: list[Line]) -> None:
        if self._track.rewinds:
            again = any(line["attempt"] > look["attempt"] and line["step"] <= look["step"] for line in lines)
        else:
            again = any(seen["step"] == look["step"] for seen in before)
        if again:
            return
        if look["loss"] is not None:
            self._track.scalars(look["step"], {"validation/loss": look["loss"]}, at=look["time"])
        if look["answers"]:
            self._track.text(look["step"], table(look["answers"]), at=look["time"])


def scalars(line: Line) -> dict[str, float]:
    """Return what a track gets of a metrics line."""
    found = {f"train/{name}": float(line[name]) for name in _SCALARS if line.get(name) is not None}
    return found | {"train/data_share": line["data_seconds"] / max(1e-9, line["seconds"])}


def table(answers: list[Line]) -> str:
    """Return sample answers as a table in Markdown."""
    columns = ("source", "question", "answer", "reference")
    rows = [columns, ("---",) * len(columns), *(tuple(answer[name] for name in columns) for answer in answers)]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |" for row in rows
    )
