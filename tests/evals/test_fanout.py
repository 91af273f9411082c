"""Questions reach engines, and answers their files, whatever dies."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from rayllava.evals.benchmark import Benchmark, Item
from rayllava.evals.fanout import EngineSpec, _Exam, evaluate
from rayllava.records import Score
from rayllava.spec import override
from tests.evals.files import write_pope, write_textvqa
from tests.evals.oracle import Oracle

LABELS = {name: ["yes", "no"] * 15 for name in ("adversarial", "popular", "random")}
ANNOTATIONS = [
    {"image_id": f"img{i // 2}", "question": f"is there a thing {i} ?", "answers": ["yes"] * 10} for i in range(20)
]

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with both benchmarks' files and something to call a model."""
    write_pope(tmp_path / "data", LABELS)
    write_textvqa(tmp_path / "data", ANNOTATIONS, ["default"] * len(ANNOTATIONS))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "seen").mkdir()
    return tmp_path


def run(place: Path, oracle: Oracle, only: str = "pope", num_engines: int = 2) -> dict[str, Score]:
    oracle = dataclasses.replace(oracle, seen=str(place / "seen"))
    return evaluate(
        place / "model",
        only=only.split(","),
        data_dir=place / "data",
        out_dir=place / "out",
        num_engines=num_engines,
        load=lambda: oracle,
    )


def rows(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "out" / "scores.json").read_text())
    return found


def answered(place: Path, key: str = "pope") -> list[str]:
    lines = (place / "out" / key / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line)["id"] for line in lines]


def pope_ids() -> list[str]:
    return [str(first + i) for first in (1, 20000001, 10000001) for i in range(30)]


def test_two_engines_answer_both_benchmarks_and_a_rerun_asks_nothing(place: Path) -> None:
    scores = run(place, Oracle(seconds=0.01), "pope,textvqa")
    assert scores["pope"].primary == ("f1", 100.0)
    assert scores["textvqa"].primary == ("accuracy", 50.0)
    assert sorted(answered(place)) == sorted(pope_ids())
    assert len(answered(place, "textvqa")) == 20
    written = json.loads((place / "out" / "pope" / "score.json").read_text())
    assert written["model"] == str(place / "model")
    assert written["decoding"] == {"temperature": 0.0, "max_new_tokens": 128, "quant": "none"}
    assert rows(place)["pope"] == {"status": "done", **written}
    assert len({path.suffix for path in (place / "seen").glob("1*.*")}) == 2, "both engines had work"

    again = run(place, Oracle(fails="thing"), "pope,textvqa")
    assert again == scores


def test_a_dead_engines_questions_are_answered_by_another_once(place: Path) -> None:
    scores = run(place, Oracle(kills="thing 17 ", seconds=0.01))
    assert (place / "seen" / "killed").exists()
    assert sorted(answered(place)) == sorted(pope_ids())
    assert scores["pope"].primary == ("f1", 100.0)
    assert scores["pope"].num_failed == 0


def test_a_question_that_kills_every_engine_fails_its_benchmark_alone(place: Path) -> None:
    with pytest.raises(ValueError, match="1 of 2 benchmarks failed: textvqa: 3 engines died on the same"):
        run(place, Oracle(kills="thing 19 ?", kills_again=True), "textvqa,pope")
    assert rows(place)["textvqa"]["status"] == "failed"
    assert rows(place)["pope"]["status"] == "done"
    assert not (place / "out" / "textvqa" / "score.json").exists()

    scores = run(place, Oracle(), "textvqa")
    assert scores["textvqa"].num_failed == 0
    assert {row["status"] for row in rows(place).values()} == {"done"}


def test_an_error_in_the_engine_fails_the_benchmark_with_its_cause(place: Path) -> None:
    with pytest.raises(ValueError, match="pope: RuntimeError: out of cheese"):
        run(place, Oracle(fails="thing 3 "), num_engines=1)
    assert rows(place)["pope"] == {"status": "failed", "error": "RuntimeError: out of cheese"}
    assert run(place, Oracle())["pope"].primary == ("f1", 100.0)


def test_a_model_that_does_not_load_is_the_reason(place: Path) -> None:
    def load() -> Oracle:
        raise ValueError("no such model")

    args: dict[str, Any] = {"data_dir": place / "data", "out_dir": place / "out", "load": load}
    with pytest.raises(ValueError, match=r"1 of 1 benchmarks failed: pope: no such model$"):
        evaluate(place / "model", only=["pope"], **args)


def test_given_up_questions_count_as_wrong_and_are_asked_again(place: Path) -> None:
    score = run(place, Oracle(aborts="thing 4 "))["pope"]
    assert (score.num, score.num_failed) == (90, 3)
    assert score.metrics["accuracy"] == pytest.approx(100 * 87 / 90)
    assert run(place, Oracle())["pope"].num_failed == 0
    assert sorted(answered(place)) == sorted(pope_ids())


def test_another_model_does_not_continue_the_answers(place: Path) -> None:
    run(place, Oracle())
    (place / "model" / "config.json").write_text('{"other": 1}')
    with pytest.raises(ValueError, match=r"holds answers with model_digest=.* give another out folder"):
        run(place, Oracle())


def test_a_missing_file_fails_one_benchmark_and_nothing_is_started_for_it(place: Path) -> None:
    (place / "data" / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 benchmarks failed: textvqa: .*_ocr.jsonl is missing"):
        run(place, Oracle(), "textvqa,pope")
    assert rows(place)["pope"]["primary"] == {"name": "f1", "value": 100.0}


def test_an_unknown_benchmark_is_named_with_those_there_are(place: Path) -> None:
    with pytest.raises(LookupError, match="no benchmark 'popes'; there are: pope, textvqa"):
        run(place, Oracle(), "popes")


def test_a_group_goes_out_together(tmp_path: Path) -> None:
    items = [Item(str(i), "?", group=f"g{i % 5}") for i in range(50)]
    plug = Benchmark("toy", "test", "toy", "x", lambda folder: items, lambda folder, answers: {})
    exam = _Exam(plug, tmp_path, tmp_path / "out", {"model": "m"})
    with exam.journal:
        chunks = []
        while chunk := exam.chunk("toy", 2):
            chunks.append([question.group for question in chunk.questions])
    assert sorted(group for groups in chunks for group in set(groups)) == ["g0", "g1", "g2", "g3", "g4"]
    assert len(chunks) > 1


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("engines=0", "engines=0: input should be greater than or equal to 1"),
        ("quant=int2", "quant=int2: input should be 'none', 'nf4' or 'int8'"),
        ("engine=2", "unknown field engine; did you mean engines"),
        ("engines", "'engines' is not field.path=value"),
    ],
)
def test_a_wrong_field_is_named(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(EngineSpec(), [word])


def test_fields_are_read() -> None:
    assert override(EngineSpec(), ["quant=nf4", "engines=2"]) == EngineSpec(quant="nf4", engines=2)
