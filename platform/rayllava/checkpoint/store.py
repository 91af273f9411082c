"""The checkpoints of a run.

    RUN/checkpoints/step-000100/state-A-00000.safetensors    what rank 0 of attempt A holds; one file a rank
    RUN/checkpoints/step-000100/manifest.json                written last: it makes the checkpoint exist

A checkpoint knows no world size: its tensors are named after parameters (`param/NAME`, `exp_avg/NAME`,
`exp_avg_sq/NAME`, float32) and which rank's file holds which is of no meaning. What lacks a manifest or a file,
does not match its digest, or comes from an attempt that was replaced, is passed over, and said so. Names carry
the attempt, so what an earlier one left behind collides with nothing; only the manifest's files are ever read.
"""

from __future__ import annotations

import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from rayllava import copies, durable
from rayllava.checkpoint.lease import check_held
from rayllava.checkpoint.ledger import Link
from rayllava.checkpoint.run import Decision, decisions, fence, new_attempt, write_decision
from rayllava.place import Place
from rayllava.spec import Spec

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
DAMAGED = "manifest.damaged.json"
_STEP_DIR = re.compile(r"step-(\d{6,})")
_READERS = 8
"""Files whose digests are checked at a time."""
_WAITS_S = (0.5, 2.0)
"""Pauses before a file that could not be read is read again."""


class StoreError(RuntimeError):
    """A checkpoint that cannot be used, or an attempt that may not write one; the message says which and why."""


class CheckpointManifest(Spec):
    """What a checkpoint holds: its manifest.json."""

    format: Literal[2] = 2
    step: int
    """Optimizer steps done; the 0-based index of the next one."""
    attempt: int
    world_size: int
    """Of the group that saved it. Information only."""
    files: dict[str, str]
    """Name to digest."""
    num_bytes: int
    ledger: Link
    """The newest segment of the ledger, which ends with this step."""
    seal: str = ""
    """Digest of all the rest, set by `sealed`."""

    def sealed(self) -> Self:
        return self.but(seal=durable.digest_of(self.model_dump(exclude={"seal"})))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint of a store."""

    name: str
    manifest: CheckpointManifest


class _Torn(Exception):
    """Why a checkpoint was never finished, or is not to be used."""


class _Damaged(Exception):
    """Why a finished checkpoint is not what was written."""


class Store:
    """The checkpoints of one run, on a file system that all workers share or in an object store."""

    def __init__(self, run: Place) -> None:
        self.run = run
        self.dir = run / "checkpoints"
        self._decided: dict[int, Decision] = {}

    def folder(self, step: int) -> Place:
        return self.dir / f"step-{step:06d}"

    def latest(self, *, set_aside: bool = False) -> Checkpoint | None:
        """Return the newest whole checkpoint, every file of it read; what is passed over is named in the log.

        With `set_aside`, which is for the holder of the lease alone, the manifest of a damaged one is renamed:
        its files stay for inspection and are not read again.
        """
        self._decided = decisions(self.run, self._decided)
        for step, names in self._listing():
            folder = self.folder(step)
            try:
                manifest = self._manifest(folder, names)
                if later := fence(self._decided, attempt=manifest.attempt, step=step):
                    raise _Torn(f"attempt {later.attempt} went on from step {later.cursor} without it")
                _check_files(folder, manifest)
            except _Torn as error:
                log.warning("passed over %s: %s", folder, error)
            except _Damaged as error:
                log.warning("passed over damaged %s: %s", folder, error)
                if set_aside:
                    (folder / MANIFEST).move(folder / DAMAGED)
                    log.warning("its manifest is %s now; remove the folder when you have seen it", folder / DAMAGED)
            else:
                return Checkpoint(folder.name, manifest)
        return None

    def fetch(self, name: str) -> Path:
        """Return a local folder with the manifest and the files of a checkpoint that `latest` has found whole.

        On a disk it is the folder itself. Out of an object store it is copied once a node (rayllava.copies); a copy
        is digested. Raises StoreError.
        """
        folder = self.dir / name
        if not folder.remote:
            if not (folder / MANIFEST).is_file():
                raise StoreError(f"{folder} is not seen here; RUN must lie where all workers can read it")
            return folder.local
        content = (folder / MANIFEST).read_bytes()
        version = f"{name}.{durable.digest_bytes(content)[:16]}"
        return copies.copy_of(self.dir.text, version, lambda target: _copy(folder, content, target))

    def prune(self, keep: int) -> None:
        """Keep the newest `keep` checkpoints; for rank 0, after its commit.

        What torn saves left goes too, but nothing of steps after the newest checkpoint, which may be being written,
        and nothing of a damaged one, which is for a person to look at and remove.
        """
        self._decided = decisions(self.run, self._decided)
        listing = self._listing()
        whole: dict[int, CheckpointManifest] = {}
        for step, names in listing:
            try:
                manifest = self._manifest(self.folder(step), names)
            except _Torn:
                continue
            if not fence(self._decided, attempt=manifest.attempt, step=step):
                whole[step] = manifest
        newest, kept = max(whole, default=0), sorted(whole, reverse=True)[:keep]
        for step, names in listing:
            if step > newest:
                continue
            folder = self.folder(step)
            ours = {MANIFEST, *whole[step].files} if step in whole else set()
            if DAMAGED in names:
                gone = ours if step not in kept else set()
            else:
                gone = names - ours if step in kept else names
            for name in sorted(gone, key=lambda name: name != MANIFEST):  # nobody finds a manifest without its files
                (folder / name).remove()
            if gone == names:
                folder.remove()
            elif not folder.remote:
                for path in folder.local.glob(".*.partial"):
                    path.unlink(missing_ok=True)

    def _listing(self) -> list[tuple[int, set[str]]]:
        """Return every step that has a folder, the newest first, with the names of its files."""
        found: dict[int, set[str]] = {}
        if not self.dir.remote and self.dir.is_dir():  # folders without a file yet
            found = {int(m[1]): set() for p in self.dir.local.iterdir() if (m := _STEP_DIR.fullmatch(p.name))}
        for place in self.dir.files():
            *_, folder, name = str(place).split("/")
            if match := _STEP_DIR.fullmatch(folder):
                found.setdefault(int(match[1]), set()).add(name)
        return sorted(found.items(), reverse=True)

    def _manifest(self, folder: Place, names: set[str]) -> CheckpointManifest:
        if MANIFEST not in names:
            raise _Torn("its manifest was set aside as damaged" if DAMAGED in names else "it was never finished")
        try:
            manifest = read_checkpoint(folder)
        except (FileNotFoundError, ValueError) as error:
            raise _Torn(f"{MANIFEST}: {str(error).splitlines()[0]}") from error
        if self.folder(manifest.step) != folder:
            raise _Torn(f"its manifest is that of step {manifest.step}")
        return manifest


def read_checkpoint(folder: Place) -> CheckpointManifest:
    """Return what a checkpoint's folder says that it holds; ValueError when that was not written so."""
    return _read(folder / MANIFEST)


def _read(place: Place) -> CheckpointManifest:
    manifest = CheckpointManifest.model_validate_json(place.read_bytes())
    if manifest != manifest.sealed():
        raise ValueError("it does not match its own digest")
    return manifest


def decide(run: Place, *, world_size: int, driver: str) -> Decision:
    """Open the next attempt: choose its checkpoint and cursor and write that down before anybody acts on it.

    `driver` is the id of the lease; ValueError when it no longer holds RUN.
    """
    check_held(run, driver)
    with new_attempt(run) as attempt:
        found = Store(run).latest(set_aside=True)
        decision = Decision(
            attempt=attempt,
            checkpoint=found.name if found else None,
            cursor=found.manifest.step if found else 0,
            world_size=world_size,
            driver=driver,
            at=time.time(),
        )
        write_decision(run, decision)
    return decision


def _check_files(folder: Place, manifest: CheckpointManifest) -> None:
    with ThreadPoolExecutor(_READERS) as pool:
        digests = pool.map(lambda name: _digest(folder / name), manifest.files)
        for (name, expected), found in zip(manifest.files.items(), digests, strict=True):
            if found != expected:
                raise _Damaged(f"{name} does not match its digest")


def _digest(place: Place) -> str:
    for wait_s in _WAITS_S:
        try:
            return place.digest()
        except FileNotFoundError:
            break
        except OSError as error:
            log.warning("%s: %s; reading it again", place, error)
            time.sleep(wait_s)
    try:
        return place.digest()
    except OSError as error:
        raise _Torn(f"{place.name} cannot be read ({error.strerror or error})") from error


def _copy(folder: Place, content: bytes, target: Path) -> None:
    """Copy a checkpoint whose manifest has this content; StoreError when a file is not what it says."""
    (target / MANIFEST).write_bytes(content)
    manifest, stamps = read_checkpoint(Place(str(target))), folder.stamps()
    copies.fetch(folder, {name: stamps.get(name, (0, 0))[0] for name in manifest.files}, target)
    for name, expected in manifest.files.items():
        if durable.digest(target / name) != expected:
            raise StoreError(f"{folder / name} does not match its digest")
