"""The quickstart's data: real formats, fixed shares, and nothing of the held-out digits in any training picture."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from rayllava.demo.pictures import make_pictures, split_scans
from rayllava.demo.quickstart import chances


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pictures") / "all"
    make_pictures(out, num_train=300)
    return out


@pytest.fixture(scope="module")
def placed(folder: Path) -> dict[str, list[dict[str, object]]]:
    return json.loads((folder / "provenance.json").read_text())["pictures"]


def ink_of(folder: Path, name: str, box: list[int]) -> np.ndarray:
    """Return how dark a box of a picture is, shrunk to a scan's 8 x 8, 0 is paper and 1 is ink."""
    picture = Image.open(folder / name).convert("L").crop(tuple(box)).resize((8, 8), Image.Resampling.BOX)
    dark = 255.0 - np.asarray(picture, dtype=np.float64)
    return (dark - dark.min()) / max(float(np.ptp(dark)), 1.0)


def test_no_held_out_scan_lies_in_a_training_picture(folder: Path, placed: dict[str, list]) -> None:
    held_out = set(split_scans()[1])
    told = {Path(name).name for name in placed if name.startswith("train/")}
    assert told == {path.name for path in (folder / "train" / "images").iterdir()}
    for name, scans in placed.items():
        indices = {scan["scan"] for scan in scans}
        assert indices <= held_out if name.startswith("eval/") else not indices & held_out, name


def test_the_pixels_bear_out_what_the_provenance_says(folder: Path, placed: dict[str, list]) -> None:
    """The scan that lies nearest to a crop is, of all 1,797, the one that was noted down for it."""
    scans = load_digits().images.reshape(1797, 64) / 16
    scans = scans - scans.mean(axis=1, keepdims=True)
    scans /= np.linalg.norm(scans, axis=1, keepdims=True)
    held_out = np.zeros(1797, dtype=bool)
    held_out[split_scans()[1]] = True
    found = []
    for name, noted in placed.items():
        for scan in noted if name.startswith("train/") else []:
            crop = ink_of(folder, name, scan["box"]).ravel()
            likeness = scans @ (crop - crop.mean())
            found.append(int(likeness.argmax()) == scan["scan"])
            assert not held_out[likeness.argmax()] or likeness.max() - likeness[scan["scan"]] < 0.05
    assert len(found) >= 600
    assert np.mean(found) >= 0.98, f"only {np.mean(found):.3f} of the crops show the noted scan"


def test_equal_scans_stay_on_one_side() -> None:
    train, held_out = split_scans()
    images = load_digits().images
    seen = {images[index].tobytes() for index in train}
    assert not any(images[index].tobytes() in seen for index in held_out)
    assert sorted([*train, *held_out]) == list(range(1797))
    assert 0.19 <= len(held_out) / 1797 <= 0.21


def test_open_questions_come_in_exact_thirds_and_have_one_truth(folder: Path) -> None:
    lines = (folder / "eval/textvqa/llava_textvqa_val_v051_ocr.jsonl").read_text().splitlines()
    questions = [json.loads(line) for line in lines]
    counts = Counter(question["category"] for question in questions)
    assert set(counts) == {"place", "read", "count"} and len(set(counts.values())) == 1
    assert len(questions) >= 400
    truths = json.loads((folder / "eval/textvqa/TextVQA_0.5.1_val.json").read_text())["data"]
    keys = {(truth["image_id"], truth["question"].lower()) for truth in truths}
    assert len(keys) == len(truths) == len(questions)
    for question in questions:
        asked, ocr, hint = question["text"].split("\n")
        assert (question["question_id"], asked.lower()) in keys
        assert (ocr, hint) == (
            "Reference OCR token: ",
            "Answer the question using a single word or phrase.",
        )
    assert all(len(truth["answers"]) == 10 for truth in truths)


def test_yes_and_no_are_balanced_in_every_category(folder: Path) -> None:
    total = 0
    for category in ("adversarial", "popular", "random"):
        lines = (folder / f"eval/pope/coco/coco_pope_{category}.json").read_text().splitlines()
        labels = [json.loads(line)["label"] for line in lines]
        assert labels.count("yes") == labels.count("no")
        total += len(labels)
    assert total >= 400
    assert chances(folder / "eval")["yes_no"] == 0.5


def test_training_files_are_llava_json_about_ordinary_pictures(folder: Path) -> None:
    kinds, text_only, turns = set(), 0, set()
    for stage in ("pretrain", "finetune"):
        for sample in json.loads((folder / "train" / f"{stage}.json").read_text()):
            first = sample["conversations"][0]
            assert first["from"] == "human" and first["value"].count("<image>") == ("image" in sample)
            text_only += "image" not in sample
            turns.add(len(sample["conversations"]) // 2)
            if "image" in sample:
                content = (folder / "train" / "images" / sample["image"]).read_bytes()
                picture = Image.open(io.BytesIO(content))
                kinds.add((picture.format, picture.size))
    assert {kind for kind, _ in kinds} == {"PNG", "JPEG"}
    assert len({size for _, size in kinds}) >= 4
    assert text_only and len(turns) > 2


def test_the_same_seed_makes_the_same_files(folder: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "again", num_train=300)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
