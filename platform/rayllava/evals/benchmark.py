"""What a benchmark is: its items, how it is asked, and what it makes of the answers.

items(folder) -> [Item] --pictures read--> Question, ... --asked--> {id: Prediction} --measure--> Score
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayllava.records import Prediction, Question, Score
from rayllava.shelf import Shelf


@dataclass(frozen=True, slots=True)
class Item:
    """A question before its pictures are read: listing a benchmark costs its text only."""

    id: str
    """Unique within its benchmark."""
    text: str
    """The complete user text, instruction suffix included, without image marks."""
    pictures: tuple[Path | bytes, ...] = ()
    """Encoded image files, or where they lie."""
    group: str = ""
    """Items of one group go to the same engine, one after the other."""


@dataclass(frozen=True)
class Benchmark:
    """A set of questions under one profile; the plug of rayllava.evals.benchmarks."""

    name: str
    """What scores call it. Variants under other profiles share the name and have files of their own."""
    profile: str
    """Prompt, decoding and scorer that its numbers belong to."""
    folder: str
    """Where its files lie under the data folder."""
    primary: str
    """Key of the headline metric in what `measure` returns."""
    items: Callable[[Path], list[Item]]
    """Everything that is asked, in the order of the official file."""
    measure: Callable[[Path, Mapping[str, str]], dict[str, float]]
    """Metrics of the stripped answers by item id. An item without an answer counts as wrong."""
    max_new_tokens: int = 128

    def listed(self, folder: Path) -> list[Item]:
        """Return the items; ValueError when one occurs twice or lacks its picture."""
        items = self.items(folder)
        seen: set[str] = set()
        for item in items:
            if item.id in seen:
                raise ValueError(f"{self.name}: question {item.id} occurs twice in {folder}")
            seen.add(item.id)
        for path in {path for item in items for path in item.pictures if isinstance(path, Path)}:
            if not path.is_file():
                raise ValueError(f"{path} is missing; put the pictures of {self.name} into {path.parent}")
        return items

    def question(self, item: Item) -> Question:
        """Read the pictures of an item."""
        images = tuple(p.read_bytes() if isinstance(p, Path) else p for p in item.pictures)
        return Question(item.id, item.text, images, self.max_new_tokens, item.group)

    def questions(self, folder: Path, skip: Container[str] = ()) -> Iterator[Question]:
        """Yield the questions whose ids are not in `skip`."""
        for item in self.listed(folder):
            if item.id not in skip:
                yield self.question(item)

    def score(self, folder: Path, predictions: Mapping[str, Prediction]) -> Score:
        """Return what the predictions are worth; every item of the benchmark is in the denominator."""
        ids = {item.id for item in self.items(folder)}
        strangers = sorted(predictions.keys() - ids)
        if strangers:
            raise ValueError(
                f"{self.name}: {len(strangers)} answers, {strangers[0]} first, belong to no question in "
                f"{folder}; were they given to another version of the data?"
            )
        metrics = self.measure(folder, {p.id: p.text.strip() for p in predictions.values()})
        return Score(
            benchmark=self.name,
            profile=self.profile,
            primary=(self.primary, metrics[self.primary]),
            metrics=metrics,
            num=len(ids),
            num_failed=len(ids - predictions.keys()),
            decoding={"temperature": 0.0, "max_new_tokens": self.max_new_tokens},
        )


BENCHMARKS = Shelf("rayllava.evals.benchmarks", Benchmark)


def read_rows(path: Path, fields: Collection[str], cure: str) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file. `cure` says where the right file comes from."""
    rows = []
    for number, line in enumerate(read_text(path, cure).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not JSON ({error.msg}); {cure}") from error
        absent = [field for field in fields if field not in row]
        if absent:
            raise ValueError(f"line {number} of {path} has no {absent[0]!r}; {cure}")
        rows.append(row)
    return rows


def read_text(path: Path, cure: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {cure}") from None
