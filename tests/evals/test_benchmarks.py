"""The official files become questions, and answers become scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayllava.evals.benchmark import BENCHMARKS
from rayllava.evals.benchmarks.textvqa import question_in
from rayllava.records import Prediction
from tests.evals.files import SUFFIX, write_pope, write_rows, write_textvqa

LABELS = {
    "adversarial": ["yes", "yes", "no", "no"],
    "popular": ["yes", "yes", "no", "no"],
    "random": ["yes", "no", "yes", "no"],
}
ANNOTATIONS = [
    {"image_id": "img1", "question": "what brand is this?", "answers": ["coke"] * 10, "question_id": 1},
    {"image_id": "img1", "question": "what number?", "answers": ["12"] * 10, "question_id": 2},
    {"image_id": "img2", "question": "what time?", "answers": ["10:30"] * 2 + ["x"] * 8, "question_id": 3},
]


def answers(texts: dict[str, str]) -> dict[str, Prediction]:
    return {id: Prediction(id, text, "stop", 1, 0.1) for id, text in texts.items()}


def pope_answers() -> dict[str, Prediction]:
    cases = json.loads((Path(__file__).parents[1] / "assets" / "eval_golden.json").read_text())
    lines = next(case for case in cases if case["id"] == "POPE/pope_llava/1")["predictions"]
    return answers({str(line["question_id"]): line["text"] for line in lines})


@pytest.mark.parametrize("key", list(BENCHMARKS))
def test_every_benchmark_names_its_profile_and_its_missing_file(key: str, tmp_path: Path) -> None:
    plug = BENCHMARKS[key]
    assert plug.profile
    with pytest.raises(ValueError, match=rf"{tmp_path}.* is missing; .* {tmp_path}"):
        plug.items(tmp_path)


def test_pope_asks_the_files_own_text_about_its_picture(tmp_path: Path) -> None:
    write_pope(tmp_path, LABELS)
    questions = list(BENCHMARKS["pope"].questions(tmp_path / "pope"))
    assert [q.id for q in questions[:5]] == ["1", "2", "3", "4", "20000001"]
    assert questions[0].text == "Is there a thing 0 in the image?" + SUFFIX
    assert questions[0].images == (b"COCO_val2014_000000000000.jpg",)
    assert questions[0].max_new_tokens == 128


def test_pope_is_the_mean_of_three_f1(tmp_path: Path) -> None:
    write_pope(tmp_path, LABELS)
    score = BENCHMARKS["pope"].score(tmp_path / "pope", pope_answers())
    assert score.primary == ("f1", pytest.approx(76.6666666667))
    assert score.metrics["f1.popular"] == pytest.approx(80)
    assert score.metrics["accuracy"] == pytest.approx(75)
    assert score.metrics["yes_ratio.popular"] == pytest.approx(75)
    assert (score.benchmark, score.profile, score.num, score.num_failed) == ("pope", "llava15", 12, 0)


def test_a_missing_answer_is_wrong_and_counted(tmp_path: Path) -> None:
    write_pope(tmp_path, LABELS)
    given = pope_answers()
    del given["10000001"]
    score = BENCHMARKS["pope"].score(tmp_path / "pope", given)
    assert (score.num, score.num_failed) == (12, 1)
    assert score.metrics["accuracy.random"] == pytest.approx(75)


def test_pope_without_a_category_is_refused(tmp_path: Path) -> None:
    write_pope(tmp_path, {name: LABELS[name] for name in ("adversarial", "random")})
    with pytest.raises(ValueError, match="asks adversarial, random; POPE is adversarial, popular, random"):
        BENCHMARKS["pope"].items(tmp_path / "pope")


def test_pope_labels_of_another_version_are_refused(tmp_path: Path) -> None:
    write_pope(tmp_path, LABELS)
    path = tmp_path / "pope" / "coco" / "coco_pope_random.json"
    path.write_text(path.read_text() * 2)
    with pytest.raises(ValueError, match="8 labels for 4 questions; take the label files of POPE's commit"):
        BENCHMARKS["pope"].score(tmp_path / "pope", {})
    rows = [{"image": "other.jpg", "label": "yes"}] * 4
    write_rows(path, rows)
    with pytest.raises(ValueError, match="out of step at question 10000001"):
        BENCHMARKS["pope"].score(tmp_path / "pope", {})


def test_a_missing_picture_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    write_pope(tmp_path, LABELS)
    path = tmp_path / "pope" / "val2014" / "COCO_val2014_000000000000.jpg"
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path} is missing; put the pictures of pope into"):
        list(BENCHMARKS["pope"].questions(tmp_path / "pope"))


def test_a_damaged_or_incomplete_line_is_named(tmp_path: Path) -> None:
    write_pope(tmp_path, LABELS)
    path = tmp_path / "pope" / "llava_pope_test.jsonl"
    good = path.read_text()
    path.write_text(good + "{")
    with pytest.raises(ValueError, match=r"line 13 of .* is not JSON"):
        BENCHMARKS["pope"].items(tmp_path / "pope")
    path.write_text(good + '{"question_id": 7}\n')
    with pytest.raises(ValueError, match=r"line 13 of .* has no 'image'"):
        BENCHMARKS["pope"].items(tmp_path / "pope")
    path.write_text(good + good.splitlines()[0])
    with pytest.raises(ValueError, match="question 1 occurs twice"):
        BENCHMARKS["pope"].listed(tmp_path / "pope")


def test_textvqa_tells_questions_about_one_image_apart(tmp_path: Path) -> None:
    write_textvqa(tmp_path, ANNOTATIONS, ["default"] * 3)
    questions = list(BENCHMARKS["textvqa"].questions(tmp_path / "textvqa", skip={"img1/0"}))
    assert [q.id for q in questions] == ["img1/1", "img2/0"]
    assert questions[0].text == "What number?\nReference OCR token: " + SUFFIX
    assert questions[0].images == (b"img1.jpg",)


def test_textvqa_is_the_mean_over_all_questions(tmp_path: Path) -> None:
    write_textvqa(tmp_path, ANNOTATIONS, ["place", "place", "time"])
    score = BENCHMARKS["textvqa"].score(tmp_path / "textvqa", answers({"img1/0": " Coke.\n", "img2/0": "10:30"}))
    assert score.primary == ("accuracy", pytest.approx(100 * 1.6 / 3))
    assert score.metrics["accuracy.place"] == pytest.approx(50)
    assert score.metrics["accuracy.time"] == pytest.approx(60)
    assert (score.num, score.num_failed) == (3, 1)


def test_one_category_is_not_reported_twice(tmp_path: Path) -> None:
    write_textvqa(tmp_path, ANNOTATIONS, ["default"] * 3)
    assert list(BENCHMARKS["textvqa"].score(tmp_path / "textvqa", {}).metrics) == ["accuracy"]


def test_answers_to_unknown_questions_are_refused(tmp_path: Path) -> None:
    write_textvqa(tmp_path, ANNOTATIONS, ["default"] * 3)
    with pytest.raises(ValueError, match="1 answers, img9/0 first, belong to no question"):
        BENCHMARKS["textvqa"].score(tmp_path / "textvqa", answers({"img9/0": "x"}))


@pytest.mark.parametrize(
    "prompt",
    [
        "What?\nReference OCR token: A, B\nshort please",
        "Reference OCR token: A, B\nWhat?\nshort please",
        "What?\nshort please",
        "OCR tokens: A, B. Question: What? Short answer:",
    ],
)
def test_a_question_is_found_in_every_prompt_llava_writes(prompt: str) -> None:
    assert question_in(prompt) == "What?"


def test_a_prompt_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no TextVQA question"):
        question_in("What?")


def test_an_answer_file_without_the_question_is_refused(tmp_path: Path) -> None:
    write_textvqa(tmp_path, ANNOTATIONS, ["default"] * 3)
    annotations: dict[str, Any] = {"data": ANNOTATIONS[1:]}
    (tmp_path / "textvqa" / "TextVQA_0.5.1_val.json").write_text(json.dumps(annotations))
    with pytest.raises(ValueError, match=r"has no answers to 'what brand is this\?' about img1"):
        BENCHMARKS["textvqa"].score(tmp_path / "textvqa", {})
