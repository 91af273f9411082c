"""Whatever meets in an atom, on a rank or in a step, the ranks stay in step and compute the same loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rayllava.recipe import ModelSpec
from tests.train.ranks import run_ranks
from tests.train.test_engine import TOWER

TUNINGS: list[dict[str, Any]] = [
    {"tuning": {"kind": "full"}},
    {"tuning": TOWER | {"vision": {"kind": "full"}}},
    {"tuning": {"kind": "projector"}},
]


@pytest.mark.parametrize(
    ("world_size", "num"),
    [(2, 6), *(pytest.param(size, 67, marks=pytest.mark.slow) for size in (2, 3, 4))],
)
def test_text_one_picture_and_several_in_any_mixture(world_size: int, num: int, parts: ModelSpec) -> None:
    seeds = list(range(1000 * world_size, 1000 * world_size + num))
    cut = -(-num // len(TUNINGS))
    given = [(changes, seeds[number * cut : (number + 1) * cut]) for number, changes in enumerate(TUNINGS)]
    task = {"model": parts.model_dump(), "given": given}
    function = "tests.train.training:mixtures"
    reference = run_ranks(function, 1, task | {"zeros": [0]})[0]["0"]
    for losses in run_ranks(function, world_size, task | {"zeros": [1, 2, 3]}, seconds=900):
        for zero, found in losses.items():
            assert found == pytest.approx(reference, rel=1e-4), f"ZeRO-{zero} at W={world_size}"
    assert len(reference) == num and np.ptp(reference) > 1e-3, "the mixtures differ, or equal losses mean nothing"
