"""Checkpoints that are torn, damaged or fenced off are never used, and attempts are decided once."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from rayllava import durable
from rayllava.checkpoint.lease import Lease
from rayllava.checkpoint.run import Decision, new_attempt, newest_attempt, read_decision, read_run, write_decision
from rayllava.checkpoint.state import write_state
from rayllava.checkpoint.store import DAMAGED, MANIFEST, Store, StoreError, decide, read_checkpoint
from rayllava.place import Place
from tests.checkpoint.group import Group, check_content, tensors


def names(folder: Place) -> set[str]:
    return {place.name for place in folder.files()}


def flip(place: Place, at: int) -> None:
    content = bytearray(place.read_bytes())
    content[at] ^= 1
    place.write_bytes(bytes(content))


def test_the_newest_whole_checkpoint_decides_where_an_attempt_starts(run: Place, driver: str) -> None:
    first = Group(run, driver, world_size=2)
    assert (first.decision.attempt, first.decision.checkpoint, first.decision.cursor) == (1, None, 0)
    first.save(5)
    first.save(10)
    second = decide(run, world_size=1, driver=driver)
    assert (second.attempt, second.checkpoint, second.cursor) == (2, "step-000010", 10)
    assert (second.driver, second.world_size) == (driver, 1)
    assert read_decision(run, 2) == second and newest_attempt(run) == 2
    assert names(run / "attempts") == {"1.json", "2.json"}


@pytest.mark.parametrize("world_size", [1, 2, 3, 12])
def test_what_any_number_of_ranks_saved_is_read_back(run: Place, driver: str, world_size: int) -> None:
    Group(run, driver, world_size=world_size).save(7)
    store = Store(run)
    found = store.latest()
    assert found is not None and (found.name, found.manifest.step) == ("step-000007", 7)
    assert len(found.manifest.files) == min(world_size, 9)  # a rank without a parameter writes no file
    assert found.manifest.num_bytes == sum((store.folder(7) / name).size() for name in found.manifest.files)
    check_content(store, found)
    assert names(store.folder(7)) == {MANIFEST, *found.manifest.files}


def test_a_state_file_is_the_librarys_and_its_digest_the_files(tmp_path: Path) -> None:
    state = tensors(3, 1) | {
        "param/half": torch.ones(3, dtype=torch.bfloat16),
        "param/scalar": torch.tensor(2.0),
        "param/none": torch.zeros(0, 4),
        "param/größe": torch.arange(5, dtype=torch.uint8),
    }
    path = tmp_path / "state.safetensors"
    digest, size = write_state(Place(str(path)), state)
    assert path.read_bytes() == save(state)
    assert (digest, size) == (durable.digest(path), path.stat().st_size)
    read = load_file(path)
    assert all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "half a manifest", "flipped manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    run: Place, driver: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    group = Group(run, driver)
    group.save(5)
    group.save(10)
    folder = Store(run).folder(10)
    state, manifest = folder / "state-1-00000.safetensors", folder / MANIFEST
    match damage:
        case "flip":
            flip(state, -3)
        case "truncate":
            state.write_bytes(state.read_bytes()[:-1])
        case "remove":
            state.remove()
        case "manifest":
            manifest.remove()
        case "half a manifest":
            manifest.write_bytes(manifest.read_bytes()[:30])
        case "flipped manifest":
            flip(manifest, manifest.read_bytes().index(b'"attempt": 1') + 11)  # reads attempt 0
    assert Store(run).latest() == Store(run).latest() and DAMAGED not in names(folder), "reading changes nothing"
    with caplog.at_level(logging.WARNING, logger="rayllava"):
        decision = decide(run, world_size=1, driver=driver)
    assert decision.checkpoint == "step-000005"
    assert "step-000010" in caplog.text
    assert (DAMAGED in names(folder)) == (damage in ("flip", "truncate"))


def test_a_damaged_checkpoint_stays_for_inspection_while_its_step_is_saved_anew(run: Place, driver: str) -> None:
    group = Group(run, driver)
    group.save(5)
    group.save(10)
    flip(Store(run).folder(10) / "state-1-00000.safetensors", -3)
    again = Group(run, driver, keep=1)
    assert again.decision.cursor == 5
    kept = {DAMAGED, "state-1-00000.safetensors"}
    again.save(10)
    assert names(Store(run).folder(10)) >= kept | {MANIFEST, "state-2-00000.safetensors"}
    found = Store(run).latest()
    assert found is not None and (found.manifest.step, found.manifest.attempt) == (10, 2)
    check_content(Store(run), found)
    again.save(15)
    assert names(Store(run).folder(10)) & (kept | {MANIFEST}) == kept
    assert "state-2-00000.safetensors" not in names(Store(run).folder(10))


def test_a_save_that_never_ended_does_not_exist(run: Place, driver: str) -> None:
    group = Group(run, driver, world_size=2, patience_s=0.3)
    group.start(5, ranks=[1])
    group.start(5, ranks=[0])
    for saver in group.savers:
        saver.wait()
    group.done = 5
    group.start(10, ranks=[0])
    with pytest.raises(TimeoutError, match="no part of step 10 from rank 1 within 0 s"):
        group.savers[0].wait()
    with pytest.raises(TimeoutError):  # the next call says it again
        group.start(15)
    found = Store(run).latest()
    assert found is not None and found.name == "step-000005"


def test_a_late_commit_of_a_replaced_attempt_is_never_used(run: Place, driver: str) -> None:
    old = Group(run, driver)
    old.save(5)
    old.save(10)
    manifest = Store(run).folder(10) / MANIFEST
    late = manifest.read_bytes()
    manifest.remove()
    new = Group(run, driver)
    assert new.decision.cursor == 5
    manifest.write_bytes(late)  # the old group's write arrives now
    found = Store(run).latest()
    assert found is not None and found.name == "step-000005"
    new.save(10)
    found = Store(run).latest()
    assert found is not None and (found.name, found.manifest.attempt) == ("step-000010", 2)
    check_content(Store(run), found)
    third = decide(run, world_size=1, driver=driver)
    assert (third.checkpoint, third.cursor) == ("step-000010", 10)


def test_a_replaced_attempt_cannot_commit(run: Place, driver: str) -> None:
    old = Group(run, driver)
    decide(run, world_size=1, driver=driver)
    with pytest.raises(StoreError, match="attempt 1 was replaced by 2 and must not commit step 5"):
        old.save(5)
    assert Store(run).latest() is None


def test_while_an_attempt_is_decided_nobody_commits(run: Place, driver: str) -> None:
    group = Group(run, driver)
    group.save(5)
    with new_attempt(run) as number:
        assert number == 2 and newest_attempt(run) == 1
        with pytest.raises(StoreError, match="attempt 1 was replaced by 2"):
            group.save(10)
    assert names(run / "attempts") == {"1.json"}


def test_two_never_get_the_same_attempt(run: Place) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def take(_: int) -> int:
        with new_attempt(run) as number:
            write_decision(run, Decision(attempt=number, checkpoint=None, cursor=0, world_size=1, driver="test"))
        return number

    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(take, range(6)))
    assert sorted(set(numbers)) == sorted(numbers)


def test_old_checkpoints_and_leftovers_go_after_a_commit(run: Place, driver: str) -> None:
    first = Group(run, driver, world_size=2)
    first.save(5)
    first.start(10, ranks=[1])  # and the group dies
    first.savers[1].wait()
    group = Group(run, driver, keep=2)
    for step in (7, 10, 15):
        (Store(run).folder(20) / "state-2-00001.safetensors").write_bytes(b"being written")
        group.save(step)
    assert {str(place).split("/")[-2] for place in Store(run).dir.files()} == {
        "step-000010",
        "step-000015",
        "step-000020",
    }
    assert names(Store(run).folder(10)) == {MANIFEST, "state-2-00000.safetensors"}
    segments = ("000001-000005.1", "000006-000007.2", "000008-000010.2", "000011-000015.2")
    assert names(run / "ledger") == {f"{segment}.jsonl" for segment in segments}


def test_a_save_runs_beside_its_caller_and_the_next_waits_for_it(run: Place, driver: str) -> None:
    group = Group(run, driver, world_size=2)
    group.start(5, ranks=[0])
    assert not group.savers[0].wait(0.1), "rank 1 has not written its part"
    assert Store(run).latest() is None
    group.start(5, ranks=[1])
    time.sleep(0.1)
    group.done = 5
    before = group.savers[0].stall_s
    group.start(10, ranks=[0])
    found = Store(run).latest()
    assert found is not None and found.name == "step-000005"
    assert 0.1 <= before <= group.savers[0].stall_s
    group.start(10, ranks=[1])
    assert all(saver.wait() for saver in group.savers)


def test_a_save_that_fails_is_raised_by_the_next_call(tmp_path: Path) -> None:
    run = Place(str(tmp_path))
    with Lease(run) as lease:
        group = Group(run, lease.id)
        (tmp_path / "checkpoints").write_text("a file where a folder has to be")
        group.start(5)
        with pytest.raises(OSError):
            group.start(10)
        assert isinstance(group.savers[0].failed, OSError)


def test_a_driver_that_lost_the_lease_decides_nothing(run: Place) -> None:
    with Lease(run) as lease:
        (run / "drivers" / f"{lease.id}.json").remove()
        with pytest.raises(ValueError, match=r"out=.* is not held by this driver any more"):
            decide(run, world_size=1, driver=lease.id)
    assert newest_attempt(run) == 0


def test_a_copy_on_a_node_is_made_once_and_whole_or_not_at_all(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = Place(address.format(tmp_path.name))
    with Lease(run) as lease:
        group = Group(run, lease.id)
        group.save(5)
        store = Store(run)
        folder = store.fetch("step-000005")
        assert folder.is_relative_to(tmp_path) and read_checkpoint(Place(str(folder))).step == 5
        before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        assert Store(run).fetch("step-000005") == folder
        assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        group.save(10)
        flip(store.folder(10) / "state-1-00000.safetensors", -3)
        with pytest.raises(StoreError, match=r"step-000010/state-1-00000.safetensors does not match its digest"):
            store.fetch("step-000010")
        assert not list(tmp_path.rglob("*step-000010*"))
        check_content(store, store.latest())  # type: ignore[arg-type]  # there is one


def test_a_folder_that_is_no_run_is_named(run: Place) -> None:
    with pytest.raises(ValueError, match=r"init_from=.* is no run \(no manifest.json\); give"):
        read_run(run, field="init_from")


def test_a_manifest_is_plain_json_that_names_its_files(run: Place, driver: str) -> None:
    Group(run, driver, world_size=2).save(5)
    folder = Store(run).folder(5)
    tree = json.loads((folder / MANIFEST).read_bytes())
    assert tree["files"] == {name: (folder / name).digest() for name in tree["files"]}
    segment = run / "ledger/000001-000005.1.jsonl"
    assert tree["ledger"] == {"file": segment.name, "digest": segment.digest()}
    assert (tree["step"], tree["attempt"], tree["world_size"]) == (5, 1, 2)


def test_a_commit_that_comes_while_an_older_checkpoint_is_chosen_does_not_remove_it(
    run: Place, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Group(run, driver, keep=1)
    old.save(5)
    write, decided = Place.write_bytes, []

    def late(place: Place, content: bytes) -> None:
        if str(place).endswith("step-000010/manifest.json") and not decided:
            decided.append(decide(run, world_size=1, driver=driver))
        write(place, content)

    monkeypatch.setattr(Place, "write_bytes", late)
    old.save(10)
    assert [decision.checkpoint for decision in decided] == ["step-000005"]
    found = Store(run).latest()
    assert found is not None and found.name == "step-000005"
    check_content(Store(run), found)
