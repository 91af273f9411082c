"""A rank that hangs is named, and the process that hangs ends."""

from __future__ import annotations

import pytest

from rayllava.train.watchdog import EXIT, Stand, late
from tests.train.ranks import start_ranks


@pytest.mark.parametrize(
    ("stands", "said"),
    [
        ({0: Stand(7, "count"), 1: Stand(7, "data")}, "rank 1 is in step 7, data"),
        ({0: Stand(7, "step"), 1: Stand(7, "step"), 2: Stand(6, "save")}, "rank 2 is in step 6, save"),
        ({0: Stand(7, "count"), 1: None}, "rank 1 does not say where it is;"),
        ({0: Stand(7, "step"), 1: Stand(7, "step")}, "all ranks are in step 7, step"),
        ({0: Stand(7, "data")}, "rank 0 is in step 7, data"),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(stands: dict[int, Stand | None], said: str) -> None:
    told = late(stands, limit_s=600)
    assert told.startswith("no progress for 600 s (scale.hang_s): ") and said in told
    assert told.endswith("; the group starts again")


def test_a_hang_ends_every_rank_and_names_the_one_at_fault() -> None:
    codes, said = start_ranks("tests.train.training:hang", 2, {"limit_s": 2.0}, errors=True)
    assert codes == [EXIT, EXIT]
    assert any("rank 1 is in step 3, data" in text for text in said), said
