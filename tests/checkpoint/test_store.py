"""Checkpoints that are torn, damaged or fenced off are never used, and attempts are decided once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from rayllava import durable
from rayllava.checkpoint.store import Store, decide, newest_attempt, read_decision, read_run


def commit(run_dir: Path, step: int, *, attempt: int, keep: int = 10) -> Path:
    store = Store(run_dir)
    partial = store.partial(step, attempt)
    partial.mkdir(parents=True)
    path = partial / "state-00000.safetensors"
    path.write_bytes(b"weights of step %d" % step)
    files = {path.name: durable.digest(path)}
    return store.commit(step, attempt=attempt, world_size=1, files=files, keep=keep)


def test_the_newest_whole_checkpoint_decides_where_an_attempt_starts(tmp_path: Path) -> None:
    first = decide(tmp_path, world_size=2)
    assert (first.attempt, first.checkpoint, first.cursor) == (1, None, 0)
    commit(tmp_path, 5, attempt=1)
    commit(tmp_path, 10, attempt=1)
    second = decide(tmp_path, world_size=1)
    assert (second.attempt, second.checkpoint, second.cursor) == (2, "step-000010", 10)
    assert read_decision(tmp_path, 2) == second
    assert newest_attempt(tmp_path) == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "half a manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    decide(tmp_path, world_size=1)
    commit(tmp_path, 5, attempt=1)
    newest = commit(tmp_path, 10, attempt=1)
    state, manifest = newest / "state-00000.safetensors", newest / "manifest.json"
    match damage:
        case "flip":
            content = bytearray(state.read_bytes())
            content[3] ^= 1
            state.write_bytes(content)
        case "truncate":
            state.write_bytes(state.read_bytes()[:-1])
        case "remove":
            state.unlink()
        case "manifest":
            manifest.unlink()
        case "half a manifest":
            manifest.write_text(manifest.read_text()[:30])
    with caplog.at_level(logging.WARNING, logger="rayllava"):
        decision = decide(tmp_path, world_size=1)
    assert decision.checkpoint == "step-000005"
    assert "step-000010" in caplog.text


def test_a_checkpoint_without_its_final_name_does_not_exist(tmp_path: Path) -> None:
    decide(tmp_path, world_size=1)
    partial = Store(tmp_path).partial(10, 1)
    partial.mkdir(parents=True)
    (partial / "state-00000.safetensors").write_bytes(b"half")
    assert Store(tmp_path).latest() is None


def test_an_attempt_that_was_replaced_cannot_commit(tmp_path: Path) -> None:
    decide(tmp_path, world_size=1)
    decide(tmp_path, world_size=1)
    with pytest.raises(AssertionError, match="attempt 1 was replaced by 2"):
        commit(tmp_path, 5, attempt=1)
    assert Store(tmp_path).latest() is None


def test_old_checkpoints_and_leftovers_go_after_a_commit(tmp_path: Path) -> None:
    decide(tmp_path, world_size=1)
    Store(tmp_path).partial(3, 1).mkdir(parents=True)
    for step in (5, 10, 15):
        commit(tmp_path, step, attempt=1, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000010",
        "step-000015",
    ]


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"init_from=.* is no run \(no manifest.json\); give"):
        read_run(tmp_path, field="init_from")
