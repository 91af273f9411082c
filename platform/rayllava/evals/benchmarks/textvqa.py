"""TextVQA: read the picture. Soft accuracy against ten human answers.

DATA/textvqa/llava_textvqa_val_v051_ocr.jsonl  question_id (the image's), image, text with OCR line, category
DATA/textvqa/TextVQA_0.5.1_val.json            data: image_id, question, answers
DATA/textvqa/train_images/                     pictures
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayllava.evals.benchmark import Benchmark, Item, read_rows, read_text
from rayllava.evals.metrics import soft_accuracy

_OCR_LABEL = "Reference OCR token: "


def items(folder: Path) -> list[Item]:
    return [
        Item(id, row["text"], (folder / "train_images" / row["image"],)) for id, row in _questions(folder).items()
    ]


def measure(folder: Path, answers: Mapping[str, str]) -> dict[str, float]:
    """Return the accuracy in percent, and that of every category when there are several."""
    humans = _annotations(folder)
    scores: dict[str, list[float]] = defaultdict(list)
    for id, row in _questions(folder).items():
        key = str(row["question_id"]), question_in(row["text"]).lower()
        if key not in humans:
            raise ValueError(f"{folder / 'TextVQA_0.5.1_val.json'} has no answers to {key[1]!r} about {key[0]}")
        score = soft_accuracy(answers[id], humans[key]) if id in answers else 0.0
        scores[row.get("category", "default")].append(score)
    metrics = {"accuracy": _percent([score for group in scores.values() for score in group])}
    if len(scores) > 1:
        metrics |= {f"accuracy.{category}": _percent(group) for category, group in scores.items()}
    return metrics


def question_in(text: str) -> str:
    """Return the bare question of a prompt: LLaVA's files hold nothing else to find its answers by."""
    lines = text.split("\n")
    if text.startswith("OCR tokens: "):
        _, _, rest = text.partition("Question: ")
        question, mark, _ = rest.partition(" Short answer:")
        if mark:
            return question
    elif len(lines) == 3 and _OCR_LABEL in text:
        return lines[1] if text.startswith(_OCR_LABEL) else lines[0]
    elif len(lines) == 2:
        return lines[0]
    raise ValueError(f"the prompt {text!r} holds no TextVQA question; use the question file of LLaVA's eval.zip")


def _questions(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the rows by IMAGE/N, N counting the questions about the image: their own ids are the image's."""
    path = folder / "llava_textvqa_val_v051_ocr.jsonl"
    fields = ("question_id", "image", "text")
    rows = read_rows(path, fields, f"take it from LLaVA's eval.zip and put it into {folder}")
    if not rows:
        raise ValueError(f"{path} is empty; take it from LLaVA's eval.zip")
    seen: Counter[str] = Counter()
    keyed = {}
    for row in rows:
        image_id = str(row["question_id"])
        keyed[f"{image_id}/{seen[image_id]}"] = row
        seen[image_id] += 1
    return keyed


def _annotations(folder: Path) -> dict[tuple[str, str], list[str]]:
    path = folder / "TextVQA_0.5.1_val.json"
    text = read_text(path, f"take it from textvqa.org and put it into {folder}")
    return {(str(a["image_id"]), a["question"].lower()): a["answers"] for a in json.loads(text)["data"]}


def _percent(scores: list[float]) -> float:
    return 100 * sum(scores) / len(scores)


PLUG = Benchmark(
    name="textvqa",
    profile="llava15",
    folder="textvqa",
    primary="accuracy",
    items=items,
    measure=measure,
)
