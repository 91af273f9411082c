"""What a run says about itself: a line a step in RUN/metrics.jsonl, and the progress that a driver shows of it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Self

from rayllava.progress import Progress


class Meter:
    """Appends metrics, on rank 0 alone. Whole lines only: a torn last line of a killed run is cut off first."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                path.write_bytes(whole)
        self.file = path.open("a", buffering=1)

    def write(self, **values: Any) -> None:
        self.file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return one entry a step in order of steps; of a step that was redone, the last."""
    steps: dict[int, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line that is being written right now
                continue
            steps[entry["step"]] = entry
    return [steps[step] for step in sorted(steps)]


class Watch:
    """Shows a run's metrics file as progress while the block runs."""

    def __init__(self, path: Path, *, num_steps: int, title: str) -> None:
        self.path = path
        self.num_steps = num_steps
        self.title = title
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        entries = read_metrics(self.path)
        with Progress("steps") as progress:
            progress.add(self.title, total=self.num_steps, done=entries[-1]["step"] if entries else 0)
            ended = False
            while not ended:
                ended = self._stop.wait(0.5)
                entries = read_metrics(self.path)
                if entries:
                    progress.at(self.title, entries[-1]["step"], note=f"loss {entries[-1]['loss']:.3f}")
