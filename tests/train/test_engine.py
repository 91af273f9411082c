"""The same numbers under every ZeRO stage, at every world size, and across save and load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rayllava.recipe import ModelSpec
from tests.train.ranks import run_ranks

STEPS = 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def curves(parts: ModelSpec, saved: Path) -> dict[str, list[float]]:
    """Loss curves by "W/ZeRO"."""
    task = {"model": parts.model_dump(), "zero": [0, 2, 3], "to": STEPS, "of": STEPS, "save_at": 8}
    found = {}
    for world_size in (1, 2):
        task["save"] = str(saved / f"w{world_size}")
        by_rank = run_ranks("tests.train.training:curve", world_size, task)
        for zero, losses in by_rank[0].items():
            found[f"{world_size}/{zero}"] = losses
    return found


def test_zero_stages_and_world_sizes_give_one_curve(curves: dict[str, list[float]]) -> None:
    reference = np.array(curves["1/0"])
    assert reference[-1] < 0.8 * reference[0], "the model must learn, or equal curves mean nothing"
    for key, losses in curves.items():
        worst = np.abs(np.array(losses) / reference - 1).max()
        assert worst <= 1e-4, f"{key} is off by {worst:.1e}"


def test_state_saved_anywhere_continues_anywhere(
    curves: dict[str, list[float]], parts: ModelSpec, saved: Path
) -> None:
    reference = np.array(curves["1/0"])
    for world_size, source in ((1, "w2/zero3"), (2, "w1/zero2")):
        task = {"model": parts.model_dump(), "zero": [0, 2, 3], "to": STEPS, "of": STEPS, "from": 8}
        task["load"] = str(saved / source)
        by_rank = run_ranks("tests.train.training:curve", world_size, task)
        for zero, losses in by_rank[0].items():
            worst = np.abs(np.array(losses) / reference[8:] - 1).max()
            assert worst <= 1e-4, f"{source} continued at W={world_size} under ZeRO-{zero}: {worst:.1e}"
