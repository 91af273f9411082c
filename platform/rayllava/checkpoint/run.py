"""A run, and what each of its attempts decided.

    RUN/manifest.json         what the run is: recipe, processor, shards, how many steps
    RUN/lengths.npy           of a packing run alone
    RUN/attempts/N.json       what attempt N decided: checkpoint, cursor, world size, driver
    RUN/attempts/N.*.claim    somebody is deciding attempt N right now

RUN is a place: a folder that all workers share, or an object store.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

from rayllava.place import Place
from rayllava.recipe import ProcessorSpec, Recipe
from rayllava.spec import Spec

LENGTHS = "lengths.npy"
"""File of a packing run: the exact positions of every sample."""
_READERS = 8


class Origin(Spec):
    """The checkpoint of another project that a run starts from, as it was when the run began."""

    path: str
    layout: str
    """Key in rayllava.checkpoint.layouts."""
    files: dict[str, str]
    """Name, from `path` on, to digest of every file that is read."""


class RunManifest(Spec):
    """What a run is: RUN/manifest.json."""

    format: Literal[1] = 1
    kind: Literal["run"] = "run"
    recipe: Recipe
    """As given, with every model part pinned (rayllava.checkpoint.resolve)."""
    processor: ProcessorSpec
    parts: dict[str, dict[str, str]] = {}
    """Digest of every file that the model is built from, by its part (llm, vision) and name."""
    shards_digest: str
    num_steps: int
    origin: Origin | None = None
    """What `init_from` names when it is no run."""
    finished: bool = False
    created: str = ""
    versions: dict[str, str] = {}


class Decision(Spec):
    """What one attempt is going to do: RUN/attempts/N.json. Decided once, read by everybody."""

    attempt: int
    checkpoint: str | None
    """Folder name under RUN/checkpoints, empty for a start from the initial weights."""
    cursor: int
    """0-based index of the first step."""
    world_size: int
    driver: str
    """Id of the lease under which it was decided."""
    at: float = 0.0
    """When, in seconds since 1970."""


def read_run(run: Place, *, field: str = "RUN") -> RunManifest:
    """Return a run's manifest; ValueError when the folder is no run."""
    try:
        text = (run / "manifest.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{field}={run} is no run (no manifest.json); give a training run's out=") from None
    try:
        return RunManifest.model_validate_json(text)
    except ValueError as error:
        raise ValueError(f"{field}={run}: manifest.json is not a run's of this version") from error


def write_run(run: Place, manifest: RunManifest) -> None:
    (run / "manifest.json").write_bytes(manifest.model_dump_json(indent=1).encode() + b"\n")


# -- attempts ------------------------------------------------------------------------------------------------


def newest_attempt(run: Place) -> int:
    """Return the number of the newest decided attempt, 0 when there was none."""
    return max((number for number, decided in _numbers(run) if decided), default=0)


def read_decision(run: Place, attempt: int) -> Decision:
    return Decision.model_validate_json((run / "attempts" / f"{attempt}.json").read_bytes())


def write_decision(run: Place, decision: Decision) -> None:
    place = run / "attempts" / f"{decision.attempt}.json"
    place.write_bytes(decision.model_dump_json(indent=1).encode() + b"\n")


def decisions(run: Place, known: Mapping[int, Decision]) -> dict[int, Decision]:
    """Return what every attempt decided, by its number; those that are known are not read again."""
    new = [number for number, decided in _numbers(run) if decided and number not in known]
    with ThreadPoolExecutor(_READERS) as pool:  # in a store each takes a while, and spot runs have hundreds
        return {**known, **dict(zip(new, pool.map(lambda number: read_decision(run, number), new), strict=True))}


def fence(decided: Mapping[int, Decision], *, attempt: int, step: int) -> Decision | None:
    """Return the decision that makes a checkpoint void: a later attempt went on from before it.

    Nothing has to keep an old group from writing. Whatever it commits late lies beyond the cursor of the attempt
    that replaced it, and is never used.
    """
    later = (decision for number, decision in sorted(decided.items()) if number > attempt)
    return next((decision for decision in later if decision.cursor < step), None)


@contextmanager
def new_attempt(run: Place) -> Iterator[int]:
    """Yield the next attempt's number, which nobody else gets, to a block that writes its decision.

    The claim stands before the block looks at any checkpoint, and a group that commits asks for later claims
    before it removes old checkpoints (`replaced`). Each writes before it looks, so whichever way they interleave
    either the group removes nothing, or the block sees its commit.
    """
    while True:
        number = max((number for number, _ in _numbers(run)), default=0) + 1
        name = f"{number}.{secrets.token_hex(6)}.claim"
        claim = run / "attempts" / name
        claim.write_bytes(b"being decided\n")
        if {place.name for place in _files(run) if _number(place) == number} == {name}:
            break
        claim.remove()
        time.sleep(random.uniform(0.05, 0.5))
    try:
        yield number
    finally:
        claim.remove()


def replaced(run: Place, attempt: int) -> int | None:
    """Return the newest attempt if it is a later one, decided or being decided."""
    newest = max((number for number, _ in _numbers(run)), default=0)
    return newest if newest > attempt else None


def _numbers(run: Place) -> list[tuple[int, bool]]:
    """Return the number of every attempt, and whether the file that names it is its decision."""
    return [(_number(place), place.name.endswith(".json")) for place in _files(run)]


def _files(run: Place) -> list[Place]:
    places = (run / "attempts").files((".json", ".claim"))
    return [place for place in places if place.name.partition(".")[0].isdigit()]


def _number(place: Place) -> int:
    return int(place.name.partition(".")[0])
