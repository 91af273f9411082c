"""How answers are compared with what is right. Each function is one published scorer, oddities included."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rayllava.evals.contractions import CONTRACTIONS

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_WORDS = CONTRACTIONS | {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}


def normalise_m4c(answer: str) -> str:
    """Return an answer as LLaVA's TextVQA evaluator compares it."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _plain_words(_without_punctuation(text))


def soft_accuracy(answer: str, humans: Sequence[str]) -> float:
    """Return the VQA accuracy, 0 to 1, of an answer against ten human ones, all normalised by m4c.

    Averaged over leaving each human out: full marks need three of the other nine to agree.
    """
    if len(humans) != 10:
        raise ValueError(f"soft accuracy needs ten human answers, not {len(humans)}")
    said = normalise_m4c(answer)
    same = [normalise_m4c(human) == said for human in humans]
    return sum(min(1.0, (sum(same) - left_out) / 3) for left_out in same) / 10


def yes_or_no_pope(answer: str) -> Literal["yes", "no"]:
    """Read an answer as LLaVA's POPE script does: what denies nothing before the first period is a yes."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


@dataclass(frozen=True, slots=True)
class YesNo:
    """Counts of a yes/no test, "yes" being positive. A ratio with nothing to divide by is 0."""

    true_yes: int = 0
    false_yes: int = 0
    true_no: int = 0
    false_no: int = 0

    def __add__(self, other: YesNo) -> YesNo:
        return YesNo(
            self.true_yes + other.true_yes,
            self.false_yes + other.false_yes,
            self.true_no + other.true_no,
            self.false_no + other.false_no,
        )

    @property
    def num(self) -> int:
        return self.true_yes + self.false_yes + self.true_no + self.false_no

    @property
    def accuracy(self) -> float:
        return _ratio(self.true_yes + self.true_no, self.num)

    @property
    def precision(self) -> float:
        return _ratio(self.true_yes, self.true_yes + self.false_yes)

    @property
    def recall(self) -> float:
        return _ratio(self.true_yes, self.true_yes + self.false_no)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        return _ratio(self.true_yes + self.false_yes, self.num)


def count_pope(answers: Iterable[str | None], labels: Iterable[str]) -> YesNo:
    """Compare answers with `yes` and `no` labels in the same order; None, no answer, is wrong either way."""
    cases = {("yes", True): 0, ("yes", False): 0, ("no", True): 0, ("no", False): 0}
    for answer, label in zip(answers, labels, strict=True):
        cases[label, answer is not None and yes_or_no_pope(answer) == label] += 1
    return YesNo(
        true_yes=cases["yes", True],
        false_yes=cases["no", False],
        true_no=cases["no", True],
        false_no=cases["yes", False],
    )


def wilson(successes: float, num: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion; z=1.96 makes it one of 95 %."""
    if not 0 <= successes <= num or num == 0:
        raise ValueError(f"{successes} successes of {num} are no proportion")
    share = successes / num
    centre = share + z * z / (2 * num)
    reach = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    scale = 1 + z * z / num
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def _without_punctuation(text: str) -> str:
    """Drop a mark that touches a blank anywhere, and all marks beside 1,000; else one becomes a blank."""
    grouped_digits = re.search(r"\d,\d", text) is not None
    bare = text
    for mark in _PUNCTUATION:
        drop = grouped_digits or f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if drop else " ")
    # The original passes a flag where the count belongs: it stops after 32 periods.
    return re.sub(r"\.(?!\d)", "", bare, count=32)


def _plain_words(text: str) -> str:
    words = (word for word in text.lower().split() if word not in ("a", "an", "the"))
    return " ".join(_WORDS.get(word, word) for word in words)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
