"""Handwritten digits -> the quickstart's pictures, dialogues and benchmarks.

    1,797 scans  -> 20 % held out   -> eval/textvqa, eval/pope   in the benchmarks' own file formats
                 -> the other 80 %  -> train/                    LLaVA JSON for both stages

A picture shows two or four scans on a `Layout`. provenance.json says which scan lies where, so that anyone can
check that no benchmark digit was trained on.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedGroupKFold

from rayllava import durable

IMAGE = "<image>\n"
WORD = "\nAnswer the question using a single word or phrase."
NO_OCR = "\nReference OCR token: "
"""The line LLaVA's TextVQA prompts carry; our pictures come without recognised text."""

_YESNO = ("yes", "no")
_LOOKALIKES = {0: 6, 1: 7, 2: 3, 3: 8, 4: 9, 5: 3, 6: 0, 7: 1, 8: 3, 9: 4}


@dataclass(frozen=True)
class Layout:
    """How many digits lie where, and what the places are called, in reading order."""

    rows: int
    columns: int
    places: tuple[str, ...]
    share: float
    """Fraction of the training pictures."""


GRID = Layout(2, 2, ("top-left", "top-right", "bottom-left", "bottom-right"), 0.6)
PAIR = Layout(1, 2, ("left", "right"), 0.4)
LAYOUTS = (GRID, PAIR)


@dataclass(frozen=True)
class Scene:
    """A layout and the digits on it; all that captions and questions look at."""

    layout: Layout
    digits: tuple[int, ...]


def make_pictures(out_dir: Path, *, seed: int = 0, num_train: int = 10_000, num_eval: int = 450) -> None:
    """Write training pictures, both stages' dialogues, two benchmarks and their provenance to `out_dir`.

    `num_eval` questions per benchmark, a multiple of 6. The folder appears complete or not at all.
    """
    assert num_eval % 6 == 0, f"{num_eval} questions do not fall into halves and thirds"
    rng = Random(seed)
    train, held_out = split_scans()
    with durable.new_dir(out_dir) as folder:
        easel = _Easel(folder, rng)
        _write_train(easel, train, num_train)
        _write_textvqa(easel, held_out, num_eval)
        _write_pope(easel, held_out, num_eval)
        _dump(folder / "provenance.json", {"held_out": held_out, "pictures": easel.placed})


def split_scans() -> tuple[list[int], list[int]]:
    """Indices of the training scans and of the held-out scans; always the same split.

    Scans that equal each other pixel for pixel count as one group and stay on one side.
    """
    data, target = load_digits(return_X_y=True)
    groups = np.unique(data, axis=0, return_inverse=True)[1].ravel()
    folds = StratifiedGroupKFold(n_splits=5, shuffle=True, random_state=0)
    train, held_out = next(folds.split(data, target, groups))
    return train.tolist(), held_out.tolist()


def caption(scene: Scene) -> str:
    return ", ".join(f"{place} {digit}" for place, digit in zip(scene.layout.places, scene.digits, strict=True))


def dialogue(scene: Scene, rng: Random) -> list[tuple[str, str]]:
    """Questions and answers about one picture; only the first short one says how to answer, as in LLaVA's data."""
    kinds = [place_question] * 2 + [count_question] * 2 + [yesno_question] * 8
    kinds += [read_question] if scene.layout is PAIR else []
    asked = dict(kind(scene, rng) for kind in kinds)  # equal questions fall together
    turns = list(asked.items())
    rng.shuffle(turns)
    if rng.random() < 0.3:
        return [("Describe the image.", caption(scene)), *turns]
    question, answer = turns[0]
    hint = NO_OCR if answer not in _YESNO and rng.random() < 0.6 else ""
    return [(question + hint + WORD, answer), *turns[1:]]


def place_question(scene: Scene, rng: Random) -> tuple[str, str]:
    at = rng.randrange(len(scene.digits))
    return f"Which digit is at the {scene.layout.places[at]}?", str(scene.digits[at])


def read_question(scene: Scene, rng: Random) -> tuple[str, str]:
    question = rng.choice(("Which number is written here?", "What number do the digits form?"))
    return question, "".join(map(str, scene.digits))


def count_question(scene: Scene, rng: Random) -> tuple[str, str]:
    parity = rng.randrange(2)
    num = sum(digit % 2 == parity for digit in scene.digits)
    return f"How many digits are {('even', 'odd')[parity]}?", str(num)


def yesno_question(scene: Scene, rng: Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        return presence_question(rng.choice(scene.digits)), "yes"
    absent = _absent(scene)
    alike = [_LOOKALIKES[digit] for digit in scene.digits if _LOOKALIKES[digit] in absent]
    return presence_question(rng.choice(alike if alike and rng.random() < 0.5 else absent)), "no"


def presence_questions(scene: Scene, rng: Random) -> list[tuple[str, str]]:
    """Ask after every digit that is there and after as many that are not."""
    there = sorted(set(scene.digits))
    turns = [(presence_question(digit), "yes") for digit in there]
    turns += [(presence_question(digit), "no") for digit in rng.sample(_absent(scene), len(there))]
    rng.shuffle(turns)
    return turns


def presence_question(digit: int) -> str:
    return f"Is there {'an' if digit == 8 else 'a'} {digit} in the image?"


def text_dialogue(rng: Random) -> list[tuple[str, str]]:
    """A dialogue without a picture: what the digits are like."""
    turns = []
    for digit in rng.sample(range(10), 4):
        parity = rng.randrange(2)
        turns.append((f"Is {digit} {('even', 'odd')[parity]}?", _YESNO[digit % 2 != parity]))
    question, answer = turns[0]
    return [(question + WORD, answer), *turns[1:]]


class _Easel:
    """Draws scans into picture files under one folder and remembers which scan lies where."""

    def __init__(self, root: Path, rng: Random) -> None:
        self.root = root
        self.rng = rng
        self.placed: dict[str, list[dict[str, Any]]] = {}
        digits = load_digits()
        self.coverage = digits.images / digits.images.max()  # (1797, 8, 8), 1 is full ink
        self.target = digits.target

    def paint(self, file: str, layout: Layout, scans: list[int]) -> Scene:
        cell = self.rng.choice((40, 48, 56, 64))
        size = cell - self.rng.choice((0, 8))
        paper = np.array([self.rng.randint(215, 255) for _ in range(3)])
        ink = np.array([self.rng.randint(0, 90) for _ in range(3)])
        canvas = np.tile(paper, (layout.rows * cell, layout.columns * cell, 1)).astype(np.float64)
        boxes = []
        for at, scan in enumerate(scans):
            row, column = divmod(at, layout.columns)
            x, y = (side * cell + self.rng.randint(0, cell - size) for side in (column, row))
            grown = Image.fromarray(self.coverage[scan].astype(np.float32)).resize(
                (size, size), Image.Resampling.BICUBIC
            )
            ink_share = np.clip(np.asarray(grown), 0, 1)[..., None]
            canvas[y : y + size, x : x + size] += (ink - paper) * ink_share
            boxes.append({"scan": scan, "box": [x, y, x + size, y + size]})
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(canvas.round().astype(np.uint8)).save(path, quality=95)
        self.placed[file] = boxes
        return Scene(layout, tuple(int(self.target[scan]) for scan in scans))


def _write_train(easel: _Easel, scans: list[int], num: int) -> None:
    rng, deal = easel.rng, _deal(scans, easel.rng)
    layouts = rng.choices(LAYOUTS, [layout.share for layout in LAYOUTS], k=num)
    captions, dialogues = [], []
    for i, layout in enumerate(layouts):
        name = f"{i:05d}.{'jpg' if rng.random() < 0.7 else 'png'}"
        scene = easel.paint(f"train/images/{name}", layout, [next(deal) for _ in layout.places])
        captions.append(_sample(f"caption-{i:05d}", name, [("Describe the image briefly.", caption(scene))]))
        dialogues.append(_sample(f"dialogue-{i:05d}", name, dialogue(scene, rng)))
    dialogues += [_sample(f"text-{i:05d}", None, text_dialogue(rng)) for i in range(num // 30)]
    rng.shuffle(dialogues)
    _dump(easel.root / "train/pretrain.json", captions[: num * 2 // 5])  # the projector needs no more
    _dump(easel.root / "train/finetune.json", dialogues)


def _sample(name: str, image: str | None, turns: list[tuple[str, str]]) -> dict[str, Any]:
    said = [
        (IMAGE if image else "") + turns[0][0],
        turns[0][1],
        *(text for turn in turns[1:] for text in turn),
    ]
    conversations = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    return {"id": name} | ({"image": image} if image else {}) | {"conversations": conversations}


def _write_textvqa(easel: _Easel, scans: list[int], num: int) -> None:
    rng, deal = easel.rng, _deal(scans, easel.rng)
    out_dir = easel.root / "eval/textvqa"
    questions: list[dict[str, Any]] = []
    truths: list[dict[str, Any]] = []
    for i in range(num // 3):
        # A pair answers "read"; the other two kinds take turns between the same pair and a grid of their own.
        other, alone = (place_question, count_question) if i % 2 == 0 else (count_question, place_question)
        for layout, kinds in ((PAIR, (read_question, other)), (GRID, (alone,))):
            name = f"digits{i:03d}{'p' if layout is PAIR else 'g'}"
            scene = easel.paint(f"eval/textvqa/train_images/{name}.jpg", layout, [next(deal) for _ in layout.places])
            for kind in kinds:
                question, answer = kind(scene, rng)
                line = {"question_id": name, "image": f"{name}.jpg", "text": question + NO_OCR + WORD}
                questions.append(line | {"category": kind.__name__.removesuffix("_question")})
                truth = {"image_id": name, "question": question, "answers": [answer] * 10}
                truths.append({"question_id": len(truths)} | truth)
    _dump_lines(out_dir / "llava_textvqa_val_v051_ocr.jsonl", questions)
    _dump(out_dir / "TextVQA_0.5.1_val.json", {"dataset_name": "digits", "dataset_type": "val", "data": truths})


def _write_pope(easel: _Easel, scans: list[int], num: int) -> None:
    rng, deal = easel.rng, _deal(scans, easel.rng)
    out_dir = easel.root / "eval/pope"
    questions: list[dict[str, Any]] = []
    for c, category in enumerate(("adversarial", "popular", "random")):
        labels: list[dict[str, Any]] = []
        for i in range(num // 6):
            name = f"COCO_val2014_{c:06d}{i:06d}.jpg"
            layout = (GRID, GRID, PAIR)[i % 3]
            scene = easel.paint(f"eval/pope/val2014/{name}", layout, [next(deal) for _ in layout.places])
            for digit, label in ((rng.choice(scene.digits), "yes"), (_absent_by(category, scene, rng), "no")):
                text = presence_question(digit)
                labels.append({"question_id": len(labels) + 1, "image": name, "text": text, "label": label})
                asked = {"question_id": c * 10_000_000 + len(labels), "image": name, "text": text + WORD}
                questions.append(asked | {"category": category})
        _dump_lines(out_dir / f"coco/coco_pope_{category}.json", labels)
    _dump_lines(out_dir / "llava_pope_test.jsonl", questions)


def _absent_by(category: str, scene: Scene, rng: Random) -> int:
    absent = _absent(scene)
    if category == "adversarial":
        return rng.choice([_LOOKALIKES[d] for d in scene.digits if _LOOKALIKES[d] in absent] or absent)
    if category == "popular":  # every digit is equally frequent here, so the first few stand in for the popular ones
        return absent[rng.randrange(2)]
    return rng.choice(absent)


def _absent(scene: Scene) -> list[int]:
    return [digit for digit in range(10) if digit not in scene.digits]


def _deal(scans: list[int], rng: Random) -> Iterator[int]:
    """Every scan once before any scan twice."""
    while True:
        yield from rng.sample(scans, len(scans))


def _dump(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _dump_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
