"""What is tried again and what ends a run."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from rayllava.checkpoint.run import Decision, write_decision
from rayllava.place import Place
from rayllava.train.elastic import Failures

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE
BROKEN = WorkerGroupError("a collective broke", {0: RuntimeError("connection closed by peer")})
LOST = WorkerGroupError("a node went", {0: RayActorError(), 1: RuntimeError("connection closed by peer")})


@pytest.fixture
def run(tmp_path: Path) -> Place:
    place = Place(str(tmp_path))
    decide(place, attempt=1, cursor=0)
    return place


def decide(run: Place, *, attempt: int, cursor: int) -> None:
    write_decision(run, Decision(attempt=attempt, checkpoint=None, cursor=cursor, world_size=2, driver="test"))


def failing(run: Place, *nodes: dict[str, Any]) -> Failures:
    return Failures(FailureConfig(max_failures=-1), run, lambda: list(nodes))


def node(port: int) -> dict[str, Any]:
    return {"Alive": True, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}


def decisions(run: Place, *errors: TrainingFailedError) -> list[FailureDecision]:
    failures = failing(run)
    return [failures.make_decision(error) for error in errors]


def test_a_collective_that_breaks_at_the_same_place_ends_the_run(run: Place) -> None:
    assert decisions(run, *[BROKEN] * 4) == [RETRY, RETRY, RETRY, RAISE]


def test_a_collective_may_break_as_often_as_it_likes_in_a_run_that_gets_on(run: Place) -> None:
    failures = failing(run)
    for attempt in range(2, 12):
        decide(run, attempt=attempt, cursor=10 * attempt)
        assert failures.make_decision(BROKEN) == RETRY


def test_a_node_that_the_cluster_still_believes_in_is_a_lost_one(run: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_server(("127.0.0.1", 0)) as other:
        here, gone = node(listening.getsockname()[1]), node(other.getsockname()[1])
        other.close()
        failures = failing(run, here, gone)
        assert {failures.make_decision(BROKEN) for _ in range(9)} == {RETRY}
        failures = failing(run, here, gone | {"Alive": False})
        assert [failures.make_decision(BROKEN) for _ in range(4)] == [RETRY, RETRY, RETRY, RAISE]


def test_lost_workers_are_replaced_for_ever(run: Place) -> None:
    assert set(decisions(run, *[LOST] * 20)) == {RETRY}
    assert decisions(run, *[BROKEN] * 3, LOST, BROKEN) == [RETRY] * 5


@pytest.mark.parametrize("error", [ValueError("prompt.template"), AssertionError("22 labels for 23 ids")])
def test_what_would_happen_again_ends_the_run_at_once(run: Place, error: Exception) -> None:
    assert decisions(run, WorkerGroupError("wrong", {0: RuntimeError("closed"), 1: error})) == [RAISE]


def test_a_node_that_goes_while_a_group_starts_does_not_end_the_run(run: Place) -> None:
    assert decisions(run, ControllerError(WorkerGroupStartupTimeoutError(2))) == [RETRY]
    assert decisions(run, ControllerError(RayActorError())) == [RETRY]
    assert decisions(run, ControllerError(ValueError("scale.workers"))) == [RAISE]


def test_a_group_that_fails_before_it_decided_is_tried_again(tmp_path: Path) -> None:
    assert decisions(Place(str(tmp_path)), BROKEN) == [RETRY]
