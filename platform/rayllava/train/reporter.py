"""What a driver tells of its run while it trains, from the run's own files.

RUN/metrics.jsonl, RUN/watch.jsonl --every half second--> a line of progress
                                                          tracks (TensorBoard, ...)
                                                          gauges among Ray's metrics
                                   --at the end-->        RUN/goodput.json, RUN/report.html
"""

from __future__ import annotations

import json
import logging
import threading
import time
from typing import Any, Self

from rayllava.checkpoint.run import RunManifest
from rayllava.place import Place
from rayllava.progress import Progress
from rayllava.train import goodput, report
from rayllava.train.gauges import Gauges
from rayllava.train.goodput import Goodput
from rayllava.train.meter import Tail
from rayllava.train.tracks import Follower, Line
from rayllava.train.watch import FILE

log = logging.getLogger(__name__)

_LOOK_S, _LOOK_STORE_S = 0.5, 5.0
"""Between two looks at the files, on a disk and in a store."""
_TELL_S = 10.0
"""Between two times that tracks, gauges and goodput are brought up to date."""
_RECENT = 20
"""Steps that rates are averaged over."""


class Reporter:
    """Tells of a run in a thread of its own while the block runs."""

    def __init__(self, run: Place, manifest: RunManifest) -> None:
        self.run = run
        self.manifest = manifest
        self.lines: list[Line] = []
        self.looks: list[Line] = []
        self.spent: Goodput | None = None
        self._tails = Tail(run / "metrics.jsonl"), Tail(run / FILE)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def __enter__(self) -> Self:
        if self._read():
            report.write(self.run, self.manifest)  # what a driver that was killed could not write any more
        self._gauges = Gauges(self.run.name)
        names = ("tensorboard", *self.manifest.recipe.track)
        self._followers = [Follower(name, self.run, self.manifest) for name in names]
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self._end()
        except OSError as error:  # how the run itself ended is what counts
            log.warning("cannot tell of %s: %s", self.run, error)

    def _end(self) -> None:
        if self._read():
            self._tell()
        for follower in self._followers:
            follower.close()
        if self.spent:
            (self.run / "goodput.json").write_bytes(json.dumps(self.spent._asdict(), indent=1).encode() + b"\n")
            log.info("%s", self.spent.text())
            report.write(self.run, self.manifest)

    def _run(self) -> None:
        told, title = 0.0, self.run.name
        with Progress("steps") as progress:
            progress.add(title, total=self.manifest.num_steps, done=self.lines[-1]["step"] if self.lines else 0)
            ended = False
            while not ended:
                ended = self._stop.wait(_LOOK_STORE_S if self.run.remote else _LOOK_S)
                try:
                    if self._read() and time.monotonic() - told > _TELL_S:
                        self._tell()
                        told = time.monotonic()
                except OSError as error:  # a disk or store that fails for a moment must not end what only tells
                    log.warning("cannot tell of %s: %s", self.run, error)
                if self.lines:
                    recent = self.lines[-_RECENT:]
                    rate = len(recent) / max(1e-9, sum(line["seconds"] for line in recent))  # without the start
                    said = note(self.lines, self.looks, self.spent)
                    progress.at(title, self.lines[-1]["step"], note=said, rate=rate)

    def _read(self) -> bool:
        """Take over what is new in the files, and say whether there is any step at all."""
        for lines, tail in zip((self.lines, self.looks), self._tails, strict=True):
            lines += tail.new()
        return bool(self.lines)

    def _tell(self) -> None:
        self.spent = goodput.measure(self.run, self.lines)
        for follower in self._followers:
            follower.follow(self.lines, self.looks)
        self._gauges.set(numbers(self.lines, self.looks, self.spent))


def note(lines: list[Line], looks: list[Line], spent: Goodput | None) -> str:
    """Return what a line of progress says of a run: loss, speed, waits, goodput and workers."""
    last, found = lines[-1], numbers(lines, looks, spent)
    parts = [f"loss {last['loss']:.3f}"]
    if (validation := found["validation_loss"]) is not None:
        parts.append(f"validation {validation:.3f}")
    parts.append(f"{found['tokens_per_second']:,.0f} tokens/s")
    if (mfu := found["mfu"]) is not None:
        parts.append(f"MFU {mfu:.1%}")
    recent = lines[-_RECENT:]
    parts.append(f"data wait {_share(recent, 'data_seconds'):.0%}")
    if spent:
        parts.append(f"goodput {spent.goodput:.0%}")
    return ", ".join([*parts, f"{last['world_size']} workers"])


def numbers(lines: list[Line], looks: list[Line], spent: Goodput | None) -> dict[str, Any]:
    """Return what is known of each of `gauges.GAUGES`, None for the rest; rates are those of the last steps."""
    last, recent = lines[-1], lines[-_RECENT:]
    found = {
        "step": last["step"],
        "loss": last["loss"],
        "validation_loss": next((look["loss"] for look in reversed(looks) if look["loss"] is not None), None),
        "tokens_per_second": _mean(recent, "tokens_per_second"),
        "mfu": None if last["mfu"] is None else _mean(recent, "mfu"),
        "workers": last["world_size"],
    }
    if spent:
        names = ("useful", "data", "save", "watch", "lost", "restart", "waiting")
        found |= {"goodput": spent.goodput} | {f"{name}_seconds": getattr(spent, name) for name in names}
    return found


def _mean(lines: list[Line], field: str) -> float:
    known = [line[field] for line in lines if line[field] is not None]
    return sum(known) / len(known)


def _share(lines: list[Line], field: str) -> float:
    return sum(line[field] for line in lines) / max(1e-9, sum(line["seconds"] for line in lines))
