"""The pure parts of benchmarks/spot.py: traces, and the account of what a contender made of one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks import account, availability
from benchmarks.availability import Act, Change
from rayllava.train import goodput

TRACES = sorted((Path(availability.__file__).parent / "traces").glob("*.csv"))


def nodes(changes: list[Change]) -> list[int]:
    """Return how many nodes are there after each change."""
    there, found = 0, []
    for change in changes:
        there += 1 if change.joins else -1
        found.append(there)
    return found


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_every_trace_plays_on_one_to_four_nodes(path: Path) -> None:
    changes = availability.few(availability.read(path))
    assert min(nodes(changes)) == 1 and max(nodes(changes)) <= 4
    acts = availability.acts(changes)
    assert [act.at_s for act in acts] == sorted(act.at_s for act in acts)
    there: set[str] = set()
    for act in acts:
        assert (act.node in there) == (act.kind != "join"), act
        there ^= {act.node} if act.kind != "notice" else set()


def test_the_mixed_trace_has_nine_changes_three_minutes_apart() -> None:
    acts = availability.acts(availability.read(next(path for path in TRACES if path.stem == "mixed")))
    at = [act.at_s for act in acts if act.at_s > 0 and not (act.kind == "lose" and act.notice_s)]
    assert len(at) == 9 and {after - before for before, after in pairwise(at)} == {180.0}
    assert sum(act.kind == "notice" for act in acts) == 2


def test_a_large_trace_moves_a_node_for_many_instances() -> None:
    eight = [Change(0, f"i{n}", joins=True) for n in range(8)]
    trace = [*eight, Change(60, "i0", joins=False), Change(70, "i1", joins=False), Change(80, "i2", joins=False)]
    found = availability.few(trace, most=4)  # two instances a node
    assert [(change.at_s, change.node, change.joins) for change in found] == [
        *((0, f"node{n}", True) for n in (1, 2, 3, 4)),
        (70, "node1", False),
    ]


def test_a_notice_comes_before_its_loss_and_all_is_squeezed() -> None:
    changes = [Change(0, "a", joins=True), Change(480, "a", joins=False, notice_s=120)]
    acts = availability.acts(availability.squeezed(changes, 6))
    assert acts == [Act(0, "join", "a"), Act(180, "notice", "a", 60), Act(240, "lose", "a", 60)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0,add,a\n5,gone,a\n", "line 2: 5,gone,a is not"),
        ("0,add,a\n9,add,b\n5,remove,a\n", "line 3: 5 ms comes before"),
        ("0,add,a\n0,add,a\n", "line 2: a is there already"),
        ("0,remove,a\n", "line 1: a is not there"),
        ("", "holds no change"),
    ],
)
def test_a_trace_that_is_none_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "trace.csv").write_text(text)
    with pytest.raises(ValueError, match=told):
        availability.read(tmp_path / "trace.csv")


def line(step: int, time: float, *, attempt: int = 1, world_size: int = 2, **parts: float) -> dict[str, Any]:
    seconds, data = parts.get("seconds", 1.0), parts.get("data", 0.0)
    started = {"started": {"worker": time - seconds - 6, "engine": time - seconds}} if parts.get("begins") else {}
    return {
        "step": step,
        "time": time,
        "attempt": attempt,
        "world_size": world_size,
        "seconds": seconds,
        "data_seconds": data,
        "save_seconds": 0.0,
        **started,
    }


LINES = [
    line(1, 10, begins=1),
    *(line(step, 9 + step) for step in range(2, 9)),  # step 8 at 17
    line(6, 47, attempt=2, world_size=1, seconds=2, data=1.5, begins=1),  # from the checkpoint of step 5
    *(line(step, 35 + 2 * step, attempt=2, world_size=1, seconds=2) for step in range(7, 12)),  # step 11 at 57
    line(12, 80, attempt=3, seconds=1, begins=1),
    line(13, 81, attempt=3),
]
CURSORS = {1: 0, 2: 5, 3: 11}


def test_steps_that_were_done_again_or_never_saved_do_not_count() -> None:
    counting = account.kept(LINES, CURSORS, 12)
    assert [(got["attempt"], got["step"]) for got in counting] == [
        *((1, step) for step in range(1, 6)),
        *((2, step) for step in range(6, 12)),
        (3, 12),
    ]


def test_nothing_counts_but_the_last_attempt_of_one_that_starts_over() -> None:
    lines = [*(line(step, step) for step in range(1, 9)), *(line(step, 20 + step, attempt=2) for step in (1, 2, 3))]
    assert [got["time"] for got in account.kept(lines, {1: 0, 2: 0}, 2)] == [21, 22]


def test_an_attempt_without_a_step_takes_back_what_came_after_its_checkpoint() -> None:
    lines = [line(step, step) for step in range(1, 9)]
    assert len(account.kept(lines, {1: 0, 2: 4}, 4)) == 4


def test_the_account_is_that_of_a_run() -> None:
    counting = account.kept(LINES, CURSORS, 12)
    spent = goodput.spend(LINES, counting, start=0, end=100, waiting=20)
    assert goodput.step_times(LINES) == {2: 1.0, 1: 2.0}
    assert spent.useful == 5 * 1 + 6 * 2 + 1
    assert spent.goodput == pytest.approx(18 / 80)
    assert spent.lost == 3 + 1  # steps 6 to 8 of the first attempt, 13 of the last
    assert spent.wall == spent.waiting + spent.useful + spent.data + spent.save + spent.lost + spent.restart


def test_time_without_nodes_is_nobodys_fault() -> None:
    done = [(100.0, Act(0, "join", "a")), (150.0, Act(50, "lose", "a")), (180.0, Act(80, "join", "b"))]
    assert account.without_nodes(done, least=1, end=300) == 30
    assert account.without_nodes(done, least=2, end=300) == 200


def test_samples_that_an_epoch_loses_or_doubles_are_counted_once_it_is_finished() -> None:
    steps = [(0, ["a", "b"]), (0, ["a", "c"]), (0, ["c"]), (1, ["a", "a"])]
    found = account.count(steps, num_samples=4)
    assert found == account.Counted(useful=4, computed=7, epochs=1, lost=1, doubled=2)


def test_a_recovery_counts_from_what_made_it_necessary() -> None:
    done = [
        (0.0, Act(0, "join", "a")),
        (0.0, Act(0, "join", "b")),
        (16.5, Act(16.5, "lose", "a")),
        (40.0, Act(40, "join", "c")),
    ]
    loss, join = account.recoveries(LINES, done, {2: 40.0})
    assert (loss.kind, loss.attempt, loss.first, loss.redone) == ("loss", 2, pytest.approx(30.5), 3)
    assert loss.beyond == pytest.approx(53 - 16.5)  # step 9
    assert loss.parts == pytest.approx({"begun": 22.5, "decided": 1, "ready": 5, "batch": 1.5, "step": 0.5})
    assert sum(loss.parts.values()) == pytest.approx(loss.first)
    assert (join.kind, join.first, join.redone) == ("join", pytest.approx(23.0), 0)


def test_an_announced_loss_is_counted_once_whether_the_group_leaves_early_or_late() -> None:
    start = [(0.0, Act(0, "join", "a")), (0.0, Act(0, "join", "b"))]
    early = [*start, (16.0, Act(16, "notice", "a", 60)), (76.0, Act(76, "lose", "a", 60))]
    found = account.recoveries(LINES, early)
    assert [seam.kind for seam in found] == ["announced loss", "none"]
    assert found[0].first == pytest.approx(47 - 17)
    late = [*start, (2.0, Act(2, "notice", "a", 15)), (17.0, Act(17, "lose", "a", 15))]
    assert account.recoveries(LINES[:9], late)[0].kind == "announced loss"


def test_quantiles_of_nothing_are_nothing() -> None:
    assert account.quantiles([]) == {"num": 0}
    assert account.quantiles([10.0, 20.0, 30.0])["p50"] == 20.0
