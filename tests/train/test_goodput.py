"""Where the time of a run went, from lines whose account is known."""

from __future__ import annotations

from typing import Any

import pytest

from rayllava.train.goodput import account


def line(step: int, time: float, *, attempt: int = 1, world_size: int = 2, **parts: float) -> dict[str, Any]:
    return {
        "step": step,
        "time": time,
        "attempt": attempt,
        "world_size": world_size,
        "seconds": parts.get("seconds", 1.0),
        "data_seconds": parts.get("data", 0.0),
        "save_seconds": parts.get("save", 0.0),
        "watch_seconds": parts.get("watch", 0.0),
    }


def test_an_undisturbed_run_loses_only_its_start() -> None:
    found = account([line(step, 10.0 + step) for step in range(1, 91)], {1: 0.0}, [])
    assert found.wall == 100 and found.useful == 90 and found.goodput == pytest.approx(0.9)
    assert (found.restart, found.lost, found.data, found.save, found.waiting) == (pytest.approx(10.0), 0, 0, 0, 0)
    assert found.recoveries == ()


def test_every_second_has_one_place() -> None:
    lines = [line(step, 10.0 + step) for step in range(1, 11)]  # until second 20
    lines += [line(8, 45.0, attempt=2, world_size=1, seconds=2.0)]  # steps 8 to 10 again, after a wait of 15 s
    lines += [line(step, 45.0 + 2 * (step - 8), attempt=2, world_size=1, seconds=2.0) for step in (9, 10, 11)]
    lines += [line(12, 60.0, attempt=2, world_size=1, seconds=9.0, data=2.0, save=1.0, watch=4.0)]
    found = account(lines, {1: 0.0, 2: 38.0}, [(22.0, 37.0)])
    assert found.wall == 60 and found.waiting == 15
    assert found.useful == 7 * 1.0 + 5 * 2.0
    assert (found.data, found.save, found.watch, found.lost) == (2.0, 1.0, 4.0, 3.0)
    parts = found.useful + found.data + found.save + found.watch + found.lost + found.restart + found.waiting
    assert parts == found.wall
    assert found.goodput == pytest.approx(17 / 45)
    assert found.recoveries == (pytest.approx(45 - 20 - 15),)


def test_a_slow_first_step_is_no_measure_of_the_others() -> None:
    lines = [line(1, 9.0, seconds=9.0), *(line(step, 8.0 + step) for step in range(2, 11))]
    assert account(lines, {1: 0.0}, []).useful == pytest.approx(10.0)


def test_the_first_batch_of_an_attempt_belongs_to_its_start() -> None:
    lines = [line(1, 9.0, seconds=6.0, data=5.0), line(2, 10.0), line(3, 12.0, seconds=2.0, data=1.0)]
    found = account(lines, {1: 0.0}, [])
    assert (found.useful, found.data, found.restart) == (3.0, 1.0, 8.0)
