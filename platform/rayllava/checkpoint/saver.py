"""A rank's share of every checkpoint, written beside training, without a collective.

    every rank   its tensors, durable and digested     state-A-00003.safetensors
                 then what it wrote and computed       part-A-00003.json
    rank 0       waits for all parts, then             ledger segment -> manifest.json -> old checkpoints go

Each rank writes in a thread of its own. A rank that dies leaves a folder without a manifest, which does not exist.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rayllava.checkpoint import ledger
from rayllava.checkpoint.ledger import LedgerEntry, Link
from rayllava.checkpoint.run import read_decision, replaced
from rayllava.checkpoint.state import write_state
from rayllava.checkpoint.store import MANIFEST, CheckpointManifest, Store, StoreError, read_checkpoint

log = logging.getLogger(__name__)

_LOOKS_S = (0.02, 1.0)
"""First and longest pause between two looks for the parts of other ranks."""


class Saver:
    """Writes the checkpoints of one rank of an attempt, one at a time."""

    def __init__(
        self, store: Store, *, attempt: int, rank: int, world_size: int, keep: int, patience_s: float = 600.0
    ) -> None:
        """Open the saver; rank 0 needs the attempt's decision.

        Rank 0 waits `patience_s` seconds for the others' parts before a save has failed.
        """
        self.failed: BaseException | None = None
        """Why the last save failed; the next call raises it."""
        self.stall_s = 0.0
        """Seconds that callers have waited so far."""
        self.ledger: Link | None = None
        """On rank 0 the newest segment of the ledger that a checkpoint names."""
        self._store = store
        self._attempt = attempt
        self._rank = rank
        self._world_size = world_size
        self._keep = keep
        self._patience_s = patience_s
        self._thread: threading.Thread | None = None
        self._step = 0
        if rank == 0:
            decision = read_decision(store.run, attempt)
            self._step = decision.cursor
            if decision.checkpoint:
                self.ledger = read_checkpoint(store.dir / decision.checkpoint).ledger

    def start(self, step: int, tensors: Mapping[str, Tensor], entries: Sequence[LedgerEntry]) -> None:
        """Begin to write this rank's share of the checkpoint after `step` steps, once the one before is written.

        `tensors` are copies on the CPU that nobody changes before they are written; they may be none. `entries` say
        what the rank computed since the last save, a line a step. Raises what made the save before fail.
        """
        self.wait()
        assert step > self._step, f"step {step} saved after step {self._step}"
        self._thread = threading.Thread(
            target=self._run, args=(step, dict(tensors), list(entries)), name=f"save-{step}", daemon=True
        )
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Return whether nothing is being written, after `timeout` seconds at most; raise what made a save fail.

        On rank 0 a save has ended when the checkpoint exists, elsewhere when the rank's share is durable.
        """
        began = time.monotonic()
        if self._thread:
            self._thread.join(timeout)
        self.stall_s += time.monotonic() - began
        if self._thread and self._thread.is_alive():
            return False
        self._thread = None
        if self.failed is not None:
            raise self.failed
        return True

    def _run(self, step: int, tensors: dict[str, Tensor], entries: list[LedgerEntry]) -> None:
        began = time.monotonic()
        try:
            self._write(step, tensors, entries)
            if self._rank == 0:
                manifest = self._commit(step)
                log.info(
                    "saved step %d: %.1f MB of %d ranks in %.1f s to %s",
                    step,
                    manifest.num_bytes / 1e6,
                    self._world_size,
                    time.monotonic() - began,
                    self._store.folder(step),
                )
            self._step = step
        except BaseException as error:  # not swallowed: the caller's next call raises it
            self.failed = error

    def _write(self, step: int, tensors: dict[str, Tensor], entries: list[LedgerEntry]) -> None:
        folder = self._store.folder(step)
        files: dict[str, str] = {}
        size = 0
        if tensors:
            name = f"state-{self._attempt}-{self._rank:05d}.safetensors"
            files[name], size = write_state(folder / name, tensors)
        part = {"files": files, "bytes": size, "ledger": [entry.as_dict() for entry in entries]}
        (folder / self._part(self._rank)).write_bytes(json.dumps(part, ensure_ascii=False).encode())

    def _commit(self, step: int) -> CheckpointManifest:
        """Make the checkpoint exist, then drop old ones."""
        parts = self._gather(step)
        run = self._store.run
        if newer := replaced(run, self._attempt):
            raise StoreError(f"attempt {self._attempt} was replaced by {newer} and must not commit step {step}")
        lines = [LedgerEntry.of(line) for part in parts for line in part["ledger"]]
        entries = ledger.merge(lines, first=self._step + 1, last=step, world_size=self._world_size)
        link = ledger.write_segment(run, entries, attempt=self._attempt, parent=self.ledger)
        manifest = CheckpointManifest(
            step=step,
            attempt=self._attempt,
            world_size=self._world_size,
            files={name: digest for part in parts for name, digest in part["files"].items()},
            num_bytes=sum(part["bytes"] for part in parts),
            ledger=link,
        ).sealed()
        place = self._store.folder(step) / MANIFEST
        place.write_bytes(manifest.model_dump_json(indent=1).encode() + b"\n")
        self.ledger = link
        # A later attempt may have chosen an older checkpoint by now; see `run.new_attempt`.
        if not replaced(run, self._attempt):
            self._store.prune(self._keep)
        return manifest

    def _gather(self, step: int) -> list[dict[str, Any]]:
        """Return the parts of all ranks once they are there; TimeoutError that names the ranks that are late."""
        folder = self._store.folder(step)
        until = time.monotonic() + self._patience_s
        pause_s, longest_s = _LOOKS_S
        while True:
            there = {place.name for place in folder.files((".json",))}
            missing = [rank for rank in range(self._world_size) if self._part(rank) not in there]
            if not missing:
                return [json.loads((folder / self._part(rank)).read_bytes()) for rank in range(self._world_size)]
            if time.monotonic() > until:
                some = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
                raise TimeoutError(f"no part of step {step} from rank {some} within {self._patience_s:.0f} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)

    def _part(self, rank: int) -> str:
        return f"part-{self._attempt}-{rank:05d}.json"
