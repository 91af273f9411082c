"""RUN/tensorboard: event files, a new one whenever steps come again; TensorBoard then drops what older ones say."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from rayllava.checkpoint.run import RunManifest
from rayllava.place import Place
from rayllava.train.tracks import Tracker


class _Events:
    """Event files in a folder; for an object store they are written here and put there whole.

    Written through tensorboardX's own writer of records: its SummaryWriter hands them to a thread, and what it has
    flushed may not be there yet.
    """

    id = ""
    rewinds = True

    def __init__(self, folder: Place) -> None:
        self._folder = folder
        self._scratch = tempfile.TemporaryDirectory(prefix="rayllava-events-") if folder.remote else None
        self._local = Path(self._scratch.name) if self._scratch else folder.local
        self._file: Any = None

    def back(self, step: int) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog

        self._begin()
        self._write(time.time(), step=step, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: dict[str, float], *, at: float) -> None:
        from tensorboardX import summary

        for name, value in values.items():
            self._write(at, step=step, summary=summary.scalar(name, value))

    def text(self, step: int, markdown: str, *, at: float) -> None:
        from tensorboardX import summary

        self._write(at, step=step, summary=summary.text("validation/answers", markdown))

    def flush(self) -> None:
        if self._file:
            self._file.flush()
        if self._scratch:
            for path in self._local.iterdir():
                (self._folder / path.name).write_bytes(path.read_bytes())

    def close(self) -> None:
        if self._file:
            self._file.close()
        if self._scratch:
            self._scratch.cleanup()

    def _begin(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        if self._file:
            self._file.close()
        suffix = f".{time.time_ns()}"  # the time that a file's name has by itself counts seconds only
        self._file = EventsWriter(str(self._local / "events"), suffix)

    def _write(self, at: float, **event: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        if self._file is None:
            self._begin()
        self._file.write_event(Event(wall_time=at, **event))


def _open(folder: Place, manifest: RunManifest, id_: str) -> _Events:
    return _Events(folder)


PLUG = Tracker(_open, package="tensorboardX")
