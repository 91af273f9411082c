"""A run on disk, and the checkpoints in it.

    RUN/manifest.json                 what the run is: recipe, processor, shards, how many steps
    RUN/attempts/N.json               what attempt N decided: checkpoint, cursor, world size
    RUN/checkpoints/step-000100/      manifest.json, and per rank of the saving group one safetensors file

A checkpoint knows no world size: its tensors are named after parameters (`param/NAME`, `exp_avg/NAME`,
`exp_avg_sq/NAME`, float32) and which rank's file holds which is of no meaning. It exists from the moment the
folder gets its final name, which happens after every file is durable and digested. What carries another name,
lacks a file or does not match its digest is ignored, and said so.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from rayllava import durable
from rayllava.recipe import ProcessorSpec, Recipe
from rayllava.spec import Spec

log = logging.getLogger(__name__)

_STEP_DIR = re.compile(r"step-(\d{6,})")


class RunManifest(Spec):
    """What a run is: RUN/manifest.json."""

    format: Literal[1] = 1
    kind: Literal["run"] = "run"
    recipe: Recipe
    """As given, with every model part resolved to a folder."""
    processor: ProcessorSpec
    shards_digest: str
    num_steps: int
    finished: bool = False
    created: str = ""
    versions: dict[str, str] = {}


class CheckpointManifest(Spec):
    """What a checkpoint holds: its manifest.json."""

    format: Literal[1] = 1
    step: int
    """Optimizer steps done; the 0-based index of the next one."""
    attempt: int
    world_size: int
    """Of the group that saved it. Information only."""
    files: dict[str, str]
    """Name to digest."""


class Decision(Spec):
    """What one attempt is going to do: RUN/attempts/N.json. Decided once, read by everybody."""

    attempt: int
    checkpoint: str | None
    """Folder name under RUN/checkpoints, empty for a start from the initial weights."""
    cursor: int
    """0-based index of the first step."""
    world_size: int


def read_run(run_dir: Path, *, field: str = "RUN") -> RunManifest:
    """Return a run's manifest; ValueError when the folder is no run."""
    path = run_dir / "manifest.json"
    try:
        text = path.read_text()
    except OSError:
        raise ValueError(f"{field}={run_dir} is no run (no manifest.json); give a training run's out=") from None
    try:
        return RunManifest.model_validate_json(text)
    except ValueError as error:
        raise ValueError(f"{field}={run_dir}: manifest.json is not a run's of this version") from error


def write_run(run_dir: Path, manifest: RunManifest) -> None:
    durable.write_text(run_dir / "manifest.json", manifest.model_dump_json(indent=1) + "\n")


class Store:
    """The checkpoints of one run on a file system that all workers share."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.dir = run_dir / "checkpoints"

    def path(self, name: str) -> Path:
        return self.dir / name

    def latest(self) -> tuple[Path, CheckpointManifest] | None:
        """Return the newest whole checkpoint; torn ones are passed over and named in the log."""
        for folder in self._folders():
            manifest = self._read(folder)
            if manifest is not None:
                return folder, manifest
        return None

    def partial(self, step: int, attempt: int) -> Path:
        """Return the folder in which the ranks of `attempt` gather the files of a checkpoint."""
        return self.dir / f".step-{step:06d}.{attempt}.partial"

    def commit(self, step: int, *, attempt: int, world_size: int, files: Mapping[str, str], keep: int) -> Path:
        """Make the partial checkpoint real, then drop old ones. For rank 0, after all files are durable.

        An attempt that is no longer the newest may not commit.
        """
        newest = newest_attempt(self.run_dir)
        assert attempt == newest, f"attempt {attempt} was replaced by {newest} and must not commit"
        partial, folder = self.partial(step, attempt), self.dir / f"step-{step:06d}"
        manifest = CheckpointManifest(step=step, attempt=attempt, world_size=world_size, files=dict(files))
        durable.write_text(partial / "manifest.json", manifest.model_dump_json(indent=1) + "\n")
        if folder.exists():  # saved by an earlier attempt and found torn, or redone from an older one
            shutil.rmtree(folder)
        partial.rename(folder)
        durable.sync_dir(self.dir)
        self._prune(keep)
        return folder

    def _prune(self, keep: int) -> None:
        for folder in self._folders()[keep:]:
            shutil.rmtree(folder)
        for folder in self.dir.glob(".step-*.partial"):
            shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Return the checkpoint folders, newest first."""
        found = [(int(m[1]), p) for p in self.dir.glob("step-*") if (m := _STEP_DIR.fullmatch(p.name))]
        return [path for _, path in sorted(found, reverse=True)]

    def _read(self, folder: Path) -> CheckpointManifest | None:
        try:
            manifest = CheckpointManifest.model_validate_json((folder / "manifest.json").read_text())
            for name, expected in manifest.files.items():
                if durable.digest(folder / name) != expected:
                    raise ValueError(f"{name} does not match its digest")
        except (OSError, ValueError) as error:
            log.warning("ignored torn checkpoint %s: %s", folder, str(error).splitlines()[0])
            return None
        return manifest


def newest_attempt(run_dir: Path) -> int:
    """Return the number of the newest attempt, 0 when there was none."""
    numbers = [int(path.stem) for path in (run_dir / "attempts").glob("*.json") if path.stem.isdigit()]
    return max(numbers, default=0)


def decide(run_dir: Path, *, world_size: int) -> Decision:
    """Open the next attempt: choose its checkpoint and cursor and write that down before anybody acts on it."""
    found = Store(run_dir).latest()
    decision = Decision(
        attempt=newest_attempt(run_dir) + 1,
        checkpoint=found[0].name if found else None,
        cursor=found[1].step if found else 0,
        world_size=world_size,
    )
    path = run_dir / "attempts" / f"{decision.attempt}.json"
    durable.write_text(path, decision.model_dump_json(indent=1) + "\n")
    return decision


def read_decision(run_dir: Path, attempt: int) -> Decision:
    return Decision.model_validate_json((run_dir / "attempts" / f"{attempt}.json").read_text())
