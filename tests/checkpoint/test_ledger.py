"""The ledger is one unbroken chain over attempts and world sizes, and whatever is not so is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rayllava.checkpoint import ledger
from rayllava.checkpoint.ledger import LedgerEntry, LedgerError, Link, merge
from rayllava.checkpoint.run import Decision
from rayllava.checkpoint.store import Store
from rayllava.place import Place
from tests.checkpoint.group import NUM_ATOMS, Group, entries


def newest(run: Place) -> Link:
    found = Store(run).latest()
    assert found is not None
    return found.manifest.ledger


@pytest.fixture
def trained(run: Place, driver: str) -> Place:
    """Three attempts at W=1, 3 and 2; the second redoes what the first had not saved, the third had its save torn."""
    one = Group(run, driver)
    one.save(4)
    one.start(9)
    one.savers[0].wait()
    (Store(run).folder(9) / "state-1-00000.safetensors").remove()
    two = Group(run, driver, world_size=3)
    assert two.decision.cursor == 4
    two.save(6)
    two.save(8)
    Group(run, driver, world_size=2).save(11)
    return run


def test_the_newest_checkpoint_vouches_for_every_step(trained: Place) -> None:
    segments = list(ledger.chain(trained, newest(trained)))
    assert [(s.first, s.last, s.attempt) for s in segments] == [(9, 11, 3), (7, 8, 2), (5, 6, 2), (1, 4, 1)]
    assert [s.link.file for s in segments][-1] == "000001-000004.1.jsonl" and segments[-1].parent is None
    assert [s.parent for s in segments[:-1]] == [s.link for s in segments[1:]]
    for segment in segments:
        for entry in segment.entries:
            assert entry.atoms == {n: (f"a:{entry.step}.{n}", f"a:{entry.step}.{n}#1") for n in range(NUM_ATOMS)}
    assert [e.world_size for s in reversed(segments) for e in s.entries] == [1] * 4 + [3] * 4 + [2] * 3


def test_the_derived_file_holds_a_line_a_step(trained: Place) -> None:
    ledger.derive(trained, newest(trained))
    lines = [json.loads(line) for line in (trained / "ledger.jsonl").read_bytes().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 12))
    assert lines[4] == {
        "epoch": 0,
        "step": 5,
        "world_size": 3,
        "attempt": 2,
        "atoms": [{"index": n, "samples": [f"a:5.{n}", f"a:5.{n}#1"]} for n in range(NUM_ATOMS)],
        "rejected": {},
    }


def test_a_missing_or_a_changed_segment_is_named(trained: Place) -> None:
    place = trained / "ledger/000005-000006.2.jsonl"
    content = place.read_bytes()
    place.write_bytes(content.replace(b'"a:5.0"', b'"a:5.7"'))
    with pytest.raises(LedgerError, match=r"ledger/000005-000006.2.jsonl does not match its digest"):
        list(ledger.chain(trained, newest(trained)))
    place.remove()
    with pytest.raises(LedgerError, match=r"ledger/000005-000006.2.jsonl is missing"):
        ledger.derive(trained, newest(trained))


def test_strange_keys_and_reasons_cross_unchanged(tmp_path: Path) -> None:
    atoms = {0: ('po"rt\nion:1', "größe:2#3", "\u2028:4")}
    entry = LedgerEntry(1, 0, 1, 1, atoms, {"größe:2#3": "it has\nno answer"})
    run = Place(str(tmp_path))
    link = ledger.write_segment(run, [entry], attempt=1, parent=None)
    assert ledger.read_segment(run, link).entries == [entry]


DECISION = Decision(attempt=1, checkpoint=None, cursor=0, world_size=2, driver="")


def parts() -> list[LedgerEntry]:
    return [entry for rank in range(2) for entry in entries(1, 2, decision=DECISION, rank=rank)]


def test_ranks_become_one_line_a_step() -> None:
    merged = merge(parts(), first=1, last=2, world_size=2)
    assert [(entry.step, sorted(entry.atoms)) for entry in merged] == [(1, [0, 1, 2, 3]), (2, [0, 1, 2, 3])]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p[:-1], "1 ranks computed a step at W=2"),
        (lambda p: [*p, p[0]], "3 ranks computed a step at W=2"),
        (lambda p: [*p[1:], replace(p[0], atoms=p[2].atoms)], "an atom of step 1 was computed twice"),
        (lambda p: [*p[1:], replace(p[0], atoms={0: ("a",)})], r"step 1 computed the atoms \[0, 1, 3\]"),
        (lambda p: [*p[1:], replace(p[0], epoch=1)], "ranks disagree about step 1"),
        (lambda p: [*p, replace(p[0], step=3)], "step 3 in the ledger of 1 to 2"),
    ],
)
def test_an_atom_that_nobody_or_two_computed_stops_the_commit(change, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AssertionError, match=said):
        merge(change(parts()), first=1, last=2, world_size=2)
