"""The scorers give what the published ones gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayllava.evals.contractions import CONTRACTIONS
from rayllava.evals.metrics import count_pope, normalise_m4c, soft_accuracy, wilson, yes_or_no_pope

CASES = json.loads((Path(__file__).parents[1] / "assets" / "eval_golden.json").read_text())


def golden(id: str) -> dict[str, Any]:
    return next(case for case in CASES if case["id"] == id)


def test_m4c_normalises_as_llava_does() -> None:
    case = golden("TextVQA/vqa_normaliser_m4c/1")
    assert [normalise_m4c(text) for text in case["predictions"]] == case["expected"]


def test_the_contraction_table_is_whole() -> None:
    assert len(CONTRACTIONS) == 120
    assert CONTRACTIONS["aint"] == "ain't"
    assert CONTRACTIONS["twas"] == "'twas"
    assert CONTRACTIONS["somebody'd"] == "somebodyd"
    assert CONTRACTIONS["y'all'dve"] == "y'all'd've"


def test_only_32_periods_are_dropped() -> None:
    assert normalise_m4c("a." * 40) == "a" * 32 + "a." * 8


def test_soft_accuracy_is_llavas() -> None:
    case = golden("TextVQA/textvqa_m4c/1")
    said = [line["text"] for line in case["predictions"]]
    humans = [annotation["answers"] for annotation in case["inputs"]["annotations"]]
    scores = [soft_accuracy(*pair) for pair in zip(said, humans, strict=True)]
    assert scores == pytest.approx(case["expected"]["per_question"], abs=1e-6)
    assert round(100 * sum(scores) / 3, 2) == case["expected"]["printed_accuracy"]


@pytest.mark.parametrize(("num_same", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_accuracy_grows_with_the_humans_who_agree(num_same: int, score: float) -> None:
    assert soft_accuracy("x", ["x"] * num_same + ["y"] * (10 - num_same)) == pytest.approx(score)


def test_soft_accuracy_wants_ten_humans() -> None:
    with pytest.raises(ValueError, match="ten human answers, not 9"):
        soft_accuracy("x", ["x"] * 9)


def test_pope_counts_are_llavas() -> None:
    case = golden("POPE/pope_llava/1")
    f1s = []
    for category, labels in case["inputs"]["labels_by_category"].items():
        said = [line["text"] for line in case["predictions"] if line["category"] == category]
        got = count_pope(said, labels)
        want = case["expected"]["per_category"][category]
        assert [got.true_yes, got.false_yes, got.true_no, got.false_no] == want["TP,FP,TN,FN"]
        found = [got.accuracy, got.precision, got.recall, got.f1, got.yes_ratio]
        names = ["Accuracy", "Precision", "Recall", "F1 score", "Yes ratio"]
        assert found == pytest.approx([want[name] for name in names], abs=1e-6)
        f1s.append(got.f1)
    assert 100 * sum(f1s) / 3 == pytest.approx(case["expected"]["mean_f1_x100"], abs=1e-6)


@pytest.mark.parametrize(
    ("text", "word"),
    [("", "yes"), ("I cannot see it", "yes"), ("Yes. No.", "yes"), ("It is not, no", "no"), ("NO", "yes")],
)
def test_pope_takes_all_that_denies_nothing_for_a_yes(text: str, word: str) -> None:
    assert yes_or_no_pope(text) == word


def test_no_answer_is_wrong_whatever_the_label() -> None:
    got = count_pope([None, None], ["yes", "no"])
    assert (got.false_no, got.false_yes, got.num) == (1, 1, 2)
    assert got.f1 == 0


def test_wilson_holds_the_share_and_stays_a_share() -> None:
    assert wilson(50, 100) == pytest.approx((0.4038298, 0.5961702), abs=1e-7)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1
    with pytest.raises(ValueError, match="no proportion"):
        wilson(0, 0)
