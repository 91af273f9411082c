"""What is looked at while a model trains: its loss on samples that do not train, its answers to a few questions.

    first samples of watch.shards -> batches, dealt to the ranks, dummies in the gaps -> one mean loss
    watch.questions, or the first questions of the shards -> the same batch on every rank -> greedy answers

A look is a line of RUN/watch.jsonl: step, attempt, loss, num_targets, answers, ... A step that was done again may
have several; the last counts. What is computed follows from the recipe and the weights alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from rayllava import copies
from rayllava.checkpoint.run import RunManifest
from rayllava.data.shards import ShardManifest, ShardReader
from rayllava.place import Place
from rayllava.prompt.collate import collate, dummy
from rayllava.prompt.encode import Processor, SampleError
from rayllava.recipe import WatchSpec
from rayllava.records import IMAGE_MARK, Batch, Sample, Turn
from rayllava.train.engine import Engine
from rayllava.train.meter import Meter, read_lines

log = logging.getLogger(__name__)

FILE = "watch.jsonl"


class Asked(NamedTuple):
    """A question that a model is asked again and again."""

    sample: Sample
    """A dialogue that ends with the question."""
    source: str
    """Where it came from: its picture's file, or the key of a sample; empty for words of one's own."""
    reference: str
    """The right answer, empty where nobody knows it."""

    @property
    def question(self) -> str:
        return self.sample.turns[-1].text.replace(IMAGE_MARK, "").strip()


class Watch:
    """Looks at a model on one rank of its group; all ranks look together."""

    def __init__(self, manifest: RunManifest, engine: Engine) -> None:
        self.spec = manifest.recipe.watch
        self.engine = engine
        self.num_steps = manifest.num_steps
        self._place = Place(manifest.recipe.out) / FILE
        self._tokenizer = Place(manifest.recipe.out) / "tokenizer"
        self._processor_spec = manifest.processor
        data = manifest.recipe.data
        packs = data.max_tokens is not None
        self._rows = max(1, (data.max_tokens or 0) // manifest.recipe.prompt.max_length) if packs else data.atom

    def due(self, step: int, *, started: bool = False) -> bool:
        """Say whether to look after `step` steps; before an attempt's first step, whether nobody has. Collective."""
        if not watches(self.spec) or (step % self.spec.every and step != self.num_steps):
            return False
        if not started:
            return True
        seen = self.engine.rank == 0 and any(line["step"] == step for line in read_lines(self._place))
        return not self.engine.sum(seen)[0]

    def look(self, step: int, attempt: int, *, beat: Callable[[], None]) -> None:
        """Take loss and answers after `step` steps and write them down; `beat` is called now and then. Collective."""
        began = time.monotonic()
        with self.engine.at_rest():
            loss, num_targets, num_samples = self._loss(beat)
            answers = self._answers(beat)
        if self.engine.rank == 0:
            seconds = time.monotonic() - began
            self._meter.write(
                step=step,
                attempt=attempt,
                loss=loss,
                num_targets=num_targets,
                num_samples=num_samples,
                answers=[
                    {"source": one.source, "question": one.question, "answer": answer, "reference": one.reference}
                    for one, answer in zip(self._asked, answers, strict=True)
                ],
                seconds=seconds,
                time=time.time(),
            )
            self._meter.flush()
            told = "" if loss is None else f"validation loss {loss:.4f}, "
            log.info("step %d: %s%d answers in %.1f s", step, told, len(answers), seconds)

    def _loss(self, beat: Callable[[], None]) -> tuple[float | None, int, int]:
        """Return the mean over all targets of all samples, the number of targets and of samples."""
        if not self.spec.shards:
            return None, 0, 0
        total = 0.0
        for batch in self._batches:
            beat()
            total += self.engine.loss(batch)
        loss, targets, samples = self.engine.sum(
            total,
            sum(batch.num_targets for batch in self._batches),
            sum(len(batch.sample_ids) for batch in self._batches),
        )
        return loss / targets, int(targets), int(samples)

    def _answers(self, beat: Callable[[], None]) -> list[str]:
        answers: list[str] = []
        processor = self._processor
        context = self.engine.deepspeed.module.llava.config.text_config.max_position_embeddings
        for start in range(0, len(self._asked), self._rows):
            beat()
            prompts = [
                processor.encode(one.sample, open_turn=True) for one in self._asked[start : start + self._rows]
            ]
            length = max(len(prompt.ids) for prompt in prompts)
            ids = np.full((len(prompts), length), processor.spec.pad_token_id, dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, prompt in enumerate(prompts):
                ids[row, length - len(prompt.ids) :] = prompt.ids
                mask[row, length - len(prompt.ids) :] = 1
            said = self.engine.answer(
                torch.from_numpy(ids),
                torch.from_numpy(mask),
                torch.from_numpy(np.concatenate([prompt.pixels for prompt in prompts])),
                max_new_tokens=max(1, min(self.spec.max_new_tokens, context - length)),
            )
            answers += [_text(row, processor) for row in said.tolist()]
        return answers

    @cached_property
    def _meter(self) -> Meter:
        return Meter(self._place)

    @cached_property
    def _processor(self) -> Processor:
        return Processor(self._processor_spec, copies.local(self._tokenizer))

    @cached_property
    def _asked(self) -> list[Asked]:
        return asked(self.spec, self._processor)

    @cached_property
    def _batches(self) -> list[Batch]:
        """This rank's validation batches: every rank has as many."""
        reader, spec = ShardReader(self.spec.shards), self._processor_spec
        total = min(self.spec.samples, reader.manifest.num_samples)
        starts = list(range(0, total, self._rows))
        made = []
        for start in starts[self.engine.rank :: self.engine.world_size]:
            examples = []
            for sample in reader.read(range(start, min(start + self._rows, total))):
                try:
                    examples.append(self._processor.encode(sample))
                except SampleError as error:
                    log.warning("left %s out of the validation: %s", sample.key, error)
            made.append(collate(examples, pad_token_id=spec.pad_token_id) if examples else dummy(spec))
        most = -(-len(starts) // self.engine.world_size)
        return made + [dummy(spec)] * (most - len(made))


def watches(spec: WatchSpec) -> bool:
    """Say whether a recipe wants anything to be looked at."""
    return bool(spec.shards or spec.questions)


def check(spec: WatchSpec, processor: Processor) -> None:
    """Raise ValueError, with the field and the cure, when something cannot be looked at."""
    if spec.shards:
        manifest = ShardManifest.load(spec.shards, field="watch.shards")
        reader = ShardReader(manifest.dir)
        numbers = range(min(spec.samples, manifest.num_samples))
        if not any(_fits(reader.read([number])[0], processor) for number in numbers):
            raise ValueError(
                f"watch.shards={spec.shards} has no sample to take a loss of among its first {len(numbers)}; "
                "raise watch.samples, or give shards that fit prompt.template"
            )
    asked(spec, processor)


def asked(spec: WatchSpec, processor: Processor) -> list[Asked]:
    """Return what a model is asked: the recipe's questions, or else the first of the shards that can be put."""
    if spec.questions:
        return [_given(spec, number, processor) for number in range(len(spec.questions))]
    if not spec.shards:
        return []
    reader, found = ShardReader(spec.shards), list[Asked]()
    for number in range(min(spec.samples, reader.manifest.num_samples)):
        if len(found) == spec.shown:
            break
        one = _first_question(reader.read([number])[0])
        if one is not None and _fits(one.sample, processor, open_turn=True):
            found.append(one)
    return found


def _given(spec: WatchSpec, number: int, processor: Processor) -> Asked:
    picture, question = spec.questions[number]
    try:
        images = (Place(picture).read_bytes(),) if picture else ()
        mark = f"{IMAGE_MARK}\n" if picture else ""
        sample = Sample(str(number), (Turn("user", mark + question.replace(IMAGE_MARK, "").strip()),), images)
        processor.encode(sample, open_turn=True)
    except (OSError, SampleError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(
            f"watch.questions={picture or question} cannot be asked ({why}); give [[PICTURE, QUESTION], ...]"
        ) from error
    return Asked(sample, picture, "")


def _first_question(sample: Sample) -> Asked | None:
    """Return the dialogue up to its first question, whose answer it holds."""
    for number, turn in enumerate(sample.turns[:-1]):
        if turn.role == "user" and sample.turns[number + 1].role == "assistant":
            turns = sample.turns[: number + 1]
            marks = sum(said.text.count(IMAGE_MARK) for said in turns if said.role == "user")
            head = Sample(sample.id, turns, sample.images[:marks], sample.key)
            return Asked(head, sample.key, sample.turns[number + 1].text)
    return None


def _fits(sample: Sample, processor: Processor, *, open_turn: bool = False) -> bool:
    try:
        processor.encode(sample, open_turn=open_turn)
    except SampleError:
        return False
    return True


def _text(ids: list[int], processor: Processor) -> str:
    """Return an answer without its stop token and the padding behind it."""
    ends = [place for place, id_ in enumerate(ids) if id_ in processor.spec.stop_token_ids]
    return processor.decode(ids[: ends[0]] if ends else ids).strip()
