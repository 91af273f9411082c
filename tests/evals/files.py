"""POPE and TextVQA as the official files have them, only shorter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SUFFIX = "\nAnswer the question using a single word or phrase."
FIRST_ID = {"adversarial": 1, "popular": 20000001, "random": 10000001}


def write_pope(data_dir: Path, labels: dict[str, list[str]]) -> None:
    """Write a question for each label. The pictures are the bytes of their own names."""
    folder = data_dir / "pope"
    (folder / "coco").mkdir(parents=True)
    (folder / "val2014").mkdir()
    questions = []
    for category, category_labels in labels.items():
        rows = []
        for place, label in enumerate(category_labels):
            image = f"COCO_val2014_{place // 6:012d}.jpg"
            (folder / "val2014" / image).write_bytes(image.encode())
            text = f"Is there a thing {place} in the image?"
            rows.append({"question_id": place + 1, "image": image, "text": text, "label": label})
            id = FIRST_ID[category] + place
            questions.append({"question_id": id, "image": image, "text": text + SUFFIX, "category": category})
        write_rows(folder / "coco" / f"coco_pope_{category}.json", rows)
    write_rows(folder / "llava_pope_test.jsonl", questions)


def write_textvqa(data_dir: Path, annotations: list[dict[str, Any]], categories: list[str]) -> None:
    """Write a question for each annotation."""
    folder = data_dir / "textvqa"
    (folder / "train_images").mkdir(parents=True)
    rows = []
    for annotation, category in zip(annotations, categories, strict=True):
        image = f"{annotation['image_id']}.jpg"
        (folder / "train_images" / image).write_bytes(image.encode())
        text = annotation["question"].capitalize() + "\nReference OCR token: " + SUFFIX
        row = {"question_id": annotation["image_id"], "image": image, "text": text, "category": category}
        rows.append(row)
    write_rows(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": annotations}))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
