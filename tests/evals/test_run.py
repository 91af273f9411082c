"""Every answer is written once, and found again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from rayllava.evals.run import Journal, ask, claim, load_predictions, model_digest, request, score_run
from rayllava.records import Delta, Prediction, Question, Request, Turn
from tests.evals.files import write_pope
from tests.evals.oracle import Oracle

LABELS = {name: ["yes", "no"] * 3 for name in ("adversarial", "popular", "random")}


def questions(num: int) -> list[Question]:
    return [Question(f"q{i}", f"Is there a thing {i} here?\nWell?", (b"picture",)) for i in range(num)]


def prediction(id: str, text: str = "Yes") -> Prediction:
    return Prediction(id, text, "stop", 3, 0.5)


def test_a_request_has_a_mark_for_every_picture_and_no_other() -> None:
    asked = request(Question("a", "What is <image>?", (b"1", b"2"), max_new_tokens=7))
    assert asked.turns == (Turn("user", "<image>\n<image>\nWhat is ?"),)
    assert (asked.images, asked.max_new_tokens, asked.temperature) == ((b"1", b"2"), 7, 0.0)
    assert request(Question("a", "What?")).turns == (Turn("user", "What?"),)


def test_interleaved_pieces_become_whole_answers(tmp_path: Path) -> None:
    got = ask(questions(5), Oracle().generate, tmp_path / "p.jsonl")
    assert {id: p.text for id, p in got.items()} == {
        f"q{i}": text for i, text in enumerate(("Yes", "No", "Yes", "No", "Yes"))
    }
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"id", "text", "finish", "num_tokens", "seconds"}
    assert load_predictions(tmp_path / "p.jsonl") == got


def test_asking_again_asks_only_what_is_missing(tmp_path: Path) -> None:
    path, asked = tmp_path / "p.jsonl", []

    def answer(requests: Iterable[Request]) -> Iterator[Delta]:
        for each in requests:
            asked.append(each.id)
            yield Delta(each.id, "Yes", 1, 1, "stop")

    ask(questions(3), answer, path)
    ask(questions(5), answer, path)
    assert asked == ["q0", "q1", "q2", "q3", "q4"]
    assert list(load_predictions(path)) == asked


def test_what_was_answered_before_a_crash_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with pytest.raises(RuntimeError, match="cheese"):
        ask(questions(8), Oracle(fails="thing 5").generate, path)
    assert list(load_predictions(path)) == ["q1", "q0", "q3", "q2"]
    assert len(ask(questions(8), Oracle().generate, path)) == 8


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_torn_last_line_is_asked_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "p.jsonl"
    ask(questions(3), Oracle().generate, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    num_whole = 3 if cut == 1 else 2  # a line that lacks its end alone is whole
    assert len(load_predictions(path)) == num_whole
    assert len(ask(questions(3), Oracle().generate, path)) == 3
    assert [json.loads(line)["id"] for line in path.read_bytes().splitlines()] == ["q1", "q0", "q2"]


def test_damage_elsewhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    ask(questions(3), Oracle().generate, path)
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(first[:9] + "\n" + "".join(rest))
    with pytest.raises(ValueError, match=r"line 1 of .*p\.jsonl is no answer"):
        load_predictions(path)
    path.write_text(first + first)
    with pytest.raises(ValueError, match=r"line 2 of .* answers q1 again"):
        load_predictions(path)


def test_an_abandoned_question_is_not_answered(tmp_path: Path) -> None:
    got = ask(questions(3), Oracle(aborts="thing 1").generate, tmp_path / "p.jsonl")
    assert sorted(got) == ["q0", "q2"]


def test_an_engine_that_forgets_a_request_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="left 2 requests open, q0 first"):
        ask(questions(2), lambda requests: iter([d for _ in requests for d in ()]), tmp_path / "p.jsonl")


def test_two_writers_of_one_journal_are_refused(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "p.jsonl"),
        pytest.raises(ValueError, match="being written by another process"),
    ):
        Journal(tmp_path / "p.jsonl")


def test_answers_of_another_model_are_not_mixed(tmp_path: Path) -> None:
    owner = {"model": "runs/a", "model_digest": "11", "quant": "none", "profile": "llava15"}
    claim(tmp_path, owner)
    claim(tmp_path, owner | {"model": "moved/a"})
    for change in ({"model_digest": "22"}, {"quant": "nf4"}, {"profile": "other"}):
        with pytest.raises(ValueError, match=r"holds answers with .* give another out folder"):
            claim(tmp_path, owner | change)


def test_answers_of_nobody_are_not_continued(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").touch()
    with pytest.raises(ValueError, match="predictions of an unknown model"):
        claim(tmp_path, {"model": "a"})


def test_a_models_digest_follows_its_weights_and_not_its_card(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = model_digest(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    assert model_digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert model_digest(tmp_path) != before
    with pytest.raises(ValueError, match="holds no model"):
        model_digest(tmp_path / "absent")


def test_scoring_needs_nothing_but_the_answers(tmp_path: Path) -> None:
    write_pope(tmp_path / "data", LABELS)
    run_dir = tmp_path / "out"
    with Journal(run_dir / "predictions.jsonl") as journal:
        for id in (1, 2, 3, 20000001):
            journal.write(prediction(str(id)))
    score_run("pope", tmp_path / "data", run_dir)
    written = json.loads((run_dir / "score.json").read_text())
    assert written["primary"]["name"] == "f1"
    assert (written["benchmark"], written["profile"]) == ("pope", "llava15")
    assert (written["num"], written["num_failed"]) == (18, 14)
    assert set(written) >= {"metrics", "model", "decoding"}
    with pytest.raises(ValueError, match="is missing; ask the questions first"):
        score_run("pope", tmp_path / "data", tmp_path / "elsewhere")
