"""A checkpoint saved by any number of ranks under any ZeRO stage is what any other group loads, to the last bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from rayllava.checkpoint.store import Store
from rayllava.place import Place
from rayllava.recipe import ModelSpec
from tests.train.ranks import run_ranks
from tests.train.test_engine import LORA

SAVED_AT = 3
STAGES = (0, 1, 2, 3)
SIZES = (1, 2, 3, 4)
TUNINGS: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA}

Saved = dict[str, tuple[Path, dict[str, str], float]]
"""By "W/stage/tuning": the run, the digests of what its checkpoint holds, the loss of the step after it."""


@pytest.fixture(scope="module")
def save(parts: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Saved]:
    """Saves of a group of so many ranks under every stage, for full training and for adapters."""
    made: dict[int, Saved] = {}

    def saved(world_size: int) -> Saved:
        if world_size not in made:
            folder = tmp_path_factory.mktemp(f"saved-by-{world_size}")
            runs = {
                f"{world_size}/{zero}/{tuning}": {
                    "zero": zero,
                    "steps": SAVED_AT + 1,
                    "save": str(folder / f"{zero}-{tuning}"),
                    "save_at": SAVED_AT,
                    "changes": changes,
                }
                for zero in STAGES
                for tuning, changes in TUNINGS.items()
            }
            task = {"model": parts.model_dump(), "runs": runs}
            losses = run_ranks("tests.train.training:curves", world_size, task)[0]
            made[world_size] = {
                name: (Path(run["save"]), digests(Path(run["save"])), losses[name][-1]) for name, run in runs.items()
            }
        return made[world_size]

    return saved


def digests(run: Path) -> dict[str, str]:
    folder = Store(Place(str(run))).fetch(f"step-{SAVED_AT:06d}")
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            keys = file.keys()
            found |= {key: hashlib.sha256(file.get_tensor(key).tobytes()).hexdigest() for key in keys}
    return found


def check(parts: ModelSpec, sources: Saved, *, world_size: int, zero: int) -> None:
    """Load every source on so many ranks under a stage."""
    runs = {
        name: {
            "load": str(folder),
            "first": SAVED_AT,
            "steps": SAVED_AT + 1,
            "changes": TUNINGS[name.rpartition("/")[2]],
        }
        for name, (folder, _, _) in sources.items()
    }
    task = {"model": parts.model_dump(), "zero": zero, "runs": runs}
    by_rank = run_ranks("tests.train.training:states", world_size, task, seconds=900)
    for name, (_, held, loss) in sources.items():
        loaded = {key: digest for rank in by_rank for key, digest in rank[name]["held"].items()}
        assert loaded == held, f"{name} loaded at W={world_size} under ZeRO-{zero} is not what was saved"
        assert by_rank[0][name]["loss"] == pytest.approx(loss, rel=1e-5), name


def test_two_ranks_of_stage_2_continue_as_three_of_stage_3(parts: ModelSpec, save: Callable[[int], Saved]) -> None:
    check(parts, {name: one for name, one in save(2).items() if "/2/" in name}, world_size=3, zero=3)


@pytest.mark.slow
@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("world_size", SIZES)
def test_every_state_is_loaded_everywhere(
    world_size: int, zero: int, parts: ModelSpec, save: Callable[[int], Saved]
) -> None:
    sources = {name: one for size in SIZES for name, one in save(size).items()}
    assert len(sources) == len(SIZES) * len(STAGES) * len(TUNINGS)
    check(parts, sources, world_size=world_size, zero=zero)
