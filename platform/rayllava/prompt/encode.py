"""Sample -> Example: the one prompt path of training, evaluation and serving.

    images  bytes            -> pixels  uint8 (N, 3, S, S)
    turns   "<image>⏎What?"  -> ids     int32 (T,)   <image> becomes a run of image tokens
                             -> labels  int32 (T,)   -100 on everything the user said

    turns --_rounds--> questions and answers --Template.render--> spans --_strip--> runs --_fit--> runs

A run of ids knows its part of the dialogue and its round. Labels are read off the parts, and turns that
do not fit are left out by their round, so nothing is ever searched for in finished ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rayllava.prompt import pixels
from rayllava.prompt.chat import Part, Round, Span, template_of
from rayllava.prompt.tokens import Tokenizer
from rayllava.recipe import ProcessorSpec
from rayllava.records import IGNORE, IMAGE_MARK, Example, Sample, Turn


class SampleError(ValueError):
    """A sample that cannot become an example; the message says why."""


class Run(NamedTuple):
    """Neighbouring ids of one part of one round."""

    ids: np.ndarray  # int32 (T,)
    part: Part
    round: int


class Processor:
    """Turns dialogues into ids and answers back into text, as a checkpoint's manifest says."""

    def __init__(self, spec: ProcessorSpec, tokenizer_dir: Path) -> None:
        self.spec = spec
        self.template = template_of(spec.template)
        self.tokenizer = Tokenizer(tokenizer_dir)
        for name in ("image_token_id", "bos_token_id", "eos_token_id"):
            id_ = getattr(spec, name)
            if id_ is not None and id_ not in self.tokenizer.controls:
                raise ValueError(
                    f"{name}={id_} is no control token of {tokenizer_dir}; they belong to different models"
                )

    def encode(self, sample: Sample, *, open_turn: bool = False) -> Example:
        """Return the sample in the model's terms.

        With `open_turn` the dialogue ends with a question and the ids with the place of its answer; they are a
        prefix of the ids that the same dialogue has in training. Raises SampleError.
        """
        ids, spoken, cut = self._words(sample, open_turn=open_turn)
        num_images = int((ids == self.spec.image_token_id).sum()) // self.spec.num_image_tokens
        return Example(
            id=sample.key or sample.id,
            ids=ids,
            labels=np.where(spoken, ids, np.int32(IGNORE)),
            pixels=self._pixels(sample.images[:num_images]),
            cut=cut,
        )

    def length(self, sample: Sample) -> int:
        """Return how many positions the sample takes in training; its pictures are counted, not opened."""
        return len(self._words(sample, open_turn=False)[0])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids without control tokens."""
        return self.tokenizer.decode(ids)

    def _words(self, sample: Sample, *, open_turn: bool) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return (T,) ids, which of them the assistant speaks, and whether anything that is learned was cut."""
        if unknown := {turn.role for turn in sample.turns} - {"system", "user", "assistant"}:
            raise SampleError(f"there is no role {min(unknown)!r}")
        if not _is_text(sample.turns):
            raise SampleError("its text holds half a surrogate pair, which is no character")
        system, rounds = _rounds(sample.turns, open_turn=open_turn)
        rounds = self._place(rounds, num_images=len(sample.images))
        if not open_turn and rounds and rounds[-1].answer is None:
            rounds = rounds[:-1]  # a question that nobody answered; its pictures were counted above
        if not rounds:
            raise SampleError("it has no question with an answer")
        if self.template.wordless and (len(rounds) > 1 or IMAGE_MARK not in rounds[0].question):
            raise SampleError(f"template {self.spec.template} takes one question with a picture and one answer")
        whole = self._strip(self.template.render(rounds, system=system))
        kept, cut = self._fit(whole, open_turn=open_turn)
        ids = np.concatenate([run.ids for run in kept])
        spoken = np.repeat([run.part in ("answer", "stop") for run in kept], [len(run.ids) for run in kept])
        if not open_turn and not spoken.any():
            inside = f" within max_length={self.spec.max_length}" if cut else ""
            raise SampleError(f"it has no answer to learn from{inside}")
        return ids, spoken, cut

    def _place(self, rounds: list[Round], *, num_images: int) -> list[Round]:
        """Return the rounds with one mark a picture, at the front of its question unless `image_at` is written."""
        front = self.spec.image_at == "front"
        counts = [r.question.count(IMAGE_MARK) for r in rounds]
        if front and num_images == 1:  # LLaVA and XTuner take the marks of a turn for one
            counts = [min(count, 1) for count in counts]
        if sum(counts) != num_images:
            raise SampleError(f"{sum(counts)} {IMAGE_MARK} marks in its questions for {num_images} images")
        if not front:
            return rounds
        return [
            Round(_to_front(r.question, count), r.answer) if count else r
            for r, count in zip(rounds, counts, strict=True)
        ]

    def _strip(self, rounds: Sequence[Sequence[Span]]) -> list[Run]:
        """Return the ids of rendered rounds."""
        spans = [(span, number) for number, spoken in enumerate(rounds) for span in spoken]
        strip: list[Run] = []
        start = 0
        for end in range(1, len(spans) + 1):
            if end == len(spans) or self._cuts(spans[end - 1], spans[end], at_front=end == 1):
                strip += self._runs(spans[start:end])
                start = end
        return strip

    def _cuts(self, left: tuple[Span, int], right: tuple[Span, int], *, at_front: bool) -> bool:
        """Say whether two neighbours are tokenised apart, and so each with what a tokenizer does to a front."""
        kinds = {left[0].kind, right[0].kind}
        if "image" in kinds:
            return True
        if self.template.joined:
            return at_front and left[0].kind == "bos"  # it is the tokenizer that puts this one there
        places = {(_piece_of(span.part), number) for span, number in (left, right)}
        return bool(kinds & {"bos", "eos"}) or len(places) == 2

    def _runs(self, piece: Sequence[tuple[Span, int]]) -> list[Run]:
        (first, number), *rest = piece
        if first.kind == "image":
            image = np.full(self.spec.num_image_tokens, self.spec.image_token_id, dtype=np.int32)
            return [Run(image, first.part, number)]
        if first.kind in ("bos", "eos") and not rest:
            special = self._special(first)
            return [] if special is None else [Run(np.array([special], dtype=np.int32), first.part, number)]
        return self._tokenise(piece)

    def _tokenise(self, spans: Sequence[tuple[Span, int]]) -> list[Run]:
        """Return the ids of spans that are one string; a token belongs to the span of its last character."""
        texts = [self._spelled(span) for span, _ in spans]
        ends = np.cumsum([len(text) for text in texts])
        ids, starts, stops = self.tokenizer.encode("".join(texts))
        for index in range(1, len(spans)):
            asked, answered = spans[index - 1][0].part, spans[index][0].part
            if asked == "prompt" and answered != "prompt":
                seam = ends[index - 1]
                if ((starts < seam) & (seam < stops)).any():
                    # A token over the seam would be half question, half answer; no open prompt could end there.
                    return self._tokenise(spans[:index]) + self._tokenise(spans[index:])
        if not len(ids):
            return []
        owners = np.searchsorted(ends, np.maximum(starts, stops - 1), side="right").clip(max=len(spans) - 1)
        cuts = np.flatnonzero(np.diff(owners)) + 1
        return [
            Run(piece, spans[owner][0].part, spans[owner][1])
            for piece, owner in zip(np.split(ids, cuts), owners[[0, *cuts]], strict=True)
        ]

    def _spelled(self, span: Span) -> str:
        if span.kind == "said":
            return span.text
        if span.kind == "markup":
            return self.tokenizer.markup(span.text)
        special = self._special(span)
        return "" if special is None else self.tokenizer.control(special)

    def _special(self, span: Span) -> int | None:
        return self.spec.bos_token_id if span.kind == "bos" else self.spec.eos_token_id

    def _fit(self, strip: list[Run], *, open_turn: bool) -> tuple[list[Run], bool]:
        """Return what `max_length` has room for, and whether anything that is learned had to go.

        Whole rounds go first, from the end. A first round that is too long on its own loses the end of its answer,
        and with it the stop token, so that the model does not learn to stop in mid-sentence.
        """
        limit = self.spec.max_length
        ends = list(accumulate(len(run.ids) for run in strip))
        if ends[-1] <= limit:
            return strip, False
        if open_turn:
            raise SampleError(f"the prompt takes {ends[-1]} positions; max_length={limit} is the most")
        head = [run._replace(ids=run.ids[: max(0, limit - end)]) for run, end in zip(strip, [0, *ends], strict=False)]
        last = strip[-1].round
        spoken_until = dict.fromkeys(range(last + 1), 0)
        for run, end in zip(strip, ends, strict=True):
            if run.part != "gap":
                spoken_until[run.round] = end
        num_whole = sum(end <= limit for end in spoken_until.values())
        if num_whole:
            return [run for run in head if run.round < num_whole], num_whole <= last
        num_prompt = sum(len(run.ids) for run in strip if run.part == "prompt" and run.round == 0)
        if num_prompt >= limit:
            raise SampleError(
                f"its first question takes {num_prompt} positions; max_length={limit} leaves no room for an answer"
            )
        return [run for run in head if run.part != "stop"], True

    def _pixels(self, images: Sequence[bytes]) -> np.ndarray:
        size = self.spec.image_size
        squares = np.empty((len(images), 3, size, size), dtype=np.uint8)  # (N, 3, S, S)
        for number, content in enumerate(images):
            try:
                squares[number] = pixels.load(content, spec=self.spec)
            except ValueError as error:
                raise SampleError(f"image {number + 1} of {len(images)}: {error}") from error
        return squares


def _rounds(turns: Sequence[Turn], *, open_turn: bool) -> tuple[str | None, list[Round]]:
    """Return the system text, None when there is none, and the rounds; a question at the end is an open round.

    Answers before the first question are dropped and questions in a row joined by a newline, as sharding does.
    """
    num_system = next((n for n, turn in enumerate(turns) if turn.role != "system"), len(turns))
    system = "\n".join(turn.text for turn in turns[:num_system]) if num_system else None
    questions: list[str] = []
    rounds: list[Round] = []
    for turn in turns[num_system:]:
        if turn.role == "system":
            raise SampleError("a system turn stands after the dialogue began")
        if turn.role == "user":
            questions.append(turn.text)
        elif questions:
            rounds.append(Round("\n".join(questions), turn.text))
            questions = []
        elif rounds:
            raise SampleError("two assistant turns stand in a row")
    if questions:
        rounds.append(Round("\n".join(questions), None))
    elif open_turn:
        raise SampleError("it ends without a question, so there is nothing to answer")
    return system, rounds


def _to_front(question: str, count: int) -> str:
    words = question.replace(IMAGE_MARK, "").strip()
    return (f"{IMAGE_MARK}\n" * count + words).strip()


def _piece_of(part: Part) -> Part:
    """Return the part that a part is tokenised with where question, answer and gap are tokenised one by one."""
    return "answer" if part in ("stop", "silence") else part


def _is_text(turns: Iterable[Turn]) -> bool:
    try:
        "".join(turn.text for turn in turns).encode()
    except UnicodeEncodeError:
        return False
    return True
