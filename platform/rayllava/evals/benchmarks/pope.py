"""POPE: is the object in the picture? F1 of "yes", averaged over three ways of choosing absent objects.

DATA/pope/llava_pope_test.jsonl        question_id, image, text, category
DATA/pope/coco/coco_pope_CATEGORY.json a JSON line a question of the category, in the same order: image, label
DATA/pope/val2014/                     COCO pictures
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayllava.evals.benchmark import Benchmark, Item, read_rows
from rayllava.evals.metrics import YesNo, count_pope

CATEGORIES = ("adversarial", "popular", "random")


def items(folder: Path) -> list[Item]:
    return [
        Item(str(row["question_id"]), row["text"], (folder / "val2014" / row["image"],)) for row in _questions(folder)
    ]


def measure(folder: Path, answers: Mapping[str, str]) -> dict[str, float]:
    """Return percentages; without a category in their name they are of all questions pooled, but for `f1`."""
    rows = _questions(folder)
    counts = {}
    for category in CATEGORIES:
        asked = [row for row in rows if row["category"] == category]
        labels = _labels(folder, category, asked)
        counts[category] = count_pope([answers.get(str(row["question_id"])) for row in asked], labels)
    metrics = {"f1": 100 * sum(count.f1 for count in counts.values()) / len(counts)}
    metrics |= _percentages(sum(counts.values(), YesNo()), "")
    for category, count in counts.items():
        metrics[f"f1.{category}"] = 100 * count.f1
        metrics |= _percentages(count, f".{category}")
    return metrics


def _percentages(count: YesNo, suffix: str) -> dict[str, float]:
    names = ("accuracy", "precision", "recall", "yes_ratio")
    return {name + suffix: 100 * getattr(count, name) for name in names}


def _questions(folder: Path) -> list[dict[str, Any]]:
    path = folder / "llava_pope_test.jsonl"
    fields = ("question_id", "image", "text", "category")
    rows = read_rows(path, fields, f"take it from LLaVA's eval.zip and put it into {folder}")
    if {row["category"] for row in rows} != set(CATEGORIES):
        found = ", ".join(sorted({row["category"] for row in rows})) or "nothing"
        raise ValueError(f"{path} asks {found}; POPE is {', '.join(CATEGORIES)}, each of them")
    return rows


def _labels(folder: Path, category: str, asked: list[dict[str, Any]]) -> list[str]:
    """Return the labels of a category. They carry no common id: what matches is the position."""
    path = folder / "coco" / f"coco_pope_{category}.json"
    cure = f"take the label files of POPE's commit e3e39262, which LLaVA asks, and put them into {path.parent}"
    rows = read_rows(path, ("image", "label"), cure)
    if len(rows) != len(asked):
        raise ValueError(f"{path} has {len(rows)} labels for {len(asked)} questions; {cure}")
    for row, question in zip(rows, asked, strict=True):
        if row["image"] != question["image"] or row["label"] not in ("yes", "no"):
            raise ValueError(f"{path} is out of step at question {question['question_id']}; {cure}")
    return [row["label"] for row in rows]


PLUG = Benchmark(
    name="pope",
    profile="llava15",
    folder="pope",
    primary="f1",
    items=items,
    measure=measure,
)
