"""The same numbers under every ZeRO stage, at every world size, and across save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayllava.recipe import ModelSpec
from tests.train.ranks import run_ranks

STEPS, SAVED_AT = 20, 8
FEW = 12

TOWER: dict[str, Any] = {"kind": "lora", "r": 4, "alpha": 32, "dropout": 0.05}
LORA = {"tuning": TOWER | {"vision": TOWER}, "lr": 1e-2}
QLORA = {"tuning": TOWER | {"kind": "qlora", "vision": TOWER}, "lr": 1e-2}
UNDROPPED = {"tuning": TOWER | {"dropout": 0, "vision": TOWER | {"dropout": 0}}, "lr": 1e-2}
WHOLE = {"tuning": {"kind": "full", "vision": {"kind": "full"}}}
AGAIN = {"checkpointing": True}

Curves = dict[str, np.ndarray]


def run(zero: int, changes: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"zero": zero, "steps": FEW, "changes": changes or {}, **more}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def curves(parts: ModelSpec, saved: Path) -> Curves:
    """Loss curves by "W/name". A group starts once for all its curves: that takes longest."""
    runs = {
        1: {
            **{f"full/{zero}": whole_run(zero, saved / f"w1-full{zero}") for zero in (0, 2, 3)},
            "lora/2": run(2, LORA),
            "lora/2 repeated": run(2, LORA),
            "undropped/2": run(2, UNDROPPED),
            "qlora/0": run(0, QLORA),
            "qlora/3": run(3, QLORA),
            "tower/0": run(0, WHOLE),
        },
        2: {
            **{f"full/{zero}": whole_run(zero, saved / f"w2-full{zero}") for zero in (0, 2, 3)},
            "lora/2": run(2, LORA, save=str(saved / "w2-lora2"), save_at=SAVED_AT),
            "lora/3 recomputed": run(3, LORA | AGAIN),
            "qlora/2": run(2, QLORA),
            "qlora/3": run(3, QLORA),
            "qlora/3 in bfloat16": run(3, QLORA | AGAIN | {"dtype": "bfloat16"}),
            "tower/2 recomputed": run(2, WHOLE | AGAIN),
            "tower/3 recomputed": run(3, WHOLE | AGAIN),
        },
        3: {"lora/3": run(3, LORA)},
    }
    return {f"{w}/{name}": curve for w in runs for name, curve in computed(parts, w, runs[w]).items()}


def whole_run(zero: int, folder: Path) -> dict[str, Any]:
    return run(zero, steps=STEPS, save=str(folder), save_at=SAVED_AT)


def computed(parts: ModelSpec, world_size: int, runs: dict[str, Any]) -> Curves:
    by_rank = run_ranks("tests.train.training:curves", world_size, {"model": parts.model_dump(), "runs": runs})
    assert all(found == by_rank[0] for found in by_rank), "ranks see different losses"
    return {name: np.array(losses) for name, losses in by_rank[0].items()}


def worst(curves: Curves, name: str, reference: np.ndarray) -> float:
    return float(np.abs(curves[name] / reference - 1).max())


def test_zero_stages_and_world_sizes_give_one_curve(curves: Curves) -> None:
    reference = curves["1/full/0"]
    assert reference[-1] < 0.8 * reference[0], "the model must learn, or equal curves mean nothing"
    for name in (f"{w}/full/{zero}" for w in (1, 2) for zero in (0, 2, 3)):
        assert worst(curves, name, reference) <= 1e-4, name


def test_dropout_depends_on_the_atom_and_not_on_who_computes_it(curves: Curves) -> None:
    reference = curves["1/lora/2"]
    assert (curves["1/lora/2 repeated"] == reference).all(), "a repeat is not the same to the bit"
    assert worst(curves, "1/undropped/2", reference) > 5e-4, "nothing was dropped"
    for name in ("2/lora/2", "2/lora/3 recomputed", "3/lora/3"):
        assert worst(curves, name, reference) <= 1e-4, name


def test_adapters_on_nf4_give_one_curve(curves: Curves) -> None:
    reference = curves["1/qlora/0"]
    assert reference[-1] < reference[0] - 0.1, "the model must learn, or equal curves mean nothing"
    for name in ("1/qlora/3", "2/qlora/2", "2/qlora/3"):
        assert worst(curves, name, reference) <= 1e-4, name
    assert worst(curves, "2/qlora/3 in bfloat16", reference) <= 1e-2
    assert worst(curves, "1/lora/2", reference) > 1e-5, "nothing was rounded"


def test_a_training_tower_whose_activations_are_recomputed_gives_one_curve(curves: Curves) -> None:
    reference = curves["1/tower/0"]
    for name in ("2/tower/2 recomputed", "2/tower/3 recomputed"):
        assert worst(curves, name, reference) <= 1e-4, name


@pytest.mark.parametrize(("world_size", "source"), [(1, "w2-full3"), (2, "w1-full2")])
def test_state_saved_anywhere_continues_anywhere(
    world_size: int, source: str, curves: Curves, parts: ModelSpec, saved: Path
) -> None:
    runs = {f"full/{zero}": run(zero, steps=STEPS, first=SAVED_AT, load=str(saved / source)) for zero in (0, 2, 3)}
    if world_size == 1:
        runs["lora/3"] = run(3, LORA, first=SAVED_AT, load=str(saved / "w2-lora2"))
    for name, losses in computed(parts, world_size, runs).items():
        reference = curves["1/full/0" if "full" in name else "1/lora/2"][SAVED_AT:]
        assert np.abs(losses / reference - 1).max() <= 1e-4, f"{source} continued at W={world_size} as {name}"
