"""Requests -> pieces of answers: iteration-level batching over a transformers LLaVA.

    submit(request) -> waiting --step--> prefill, joined to the running rows
                       running --step--> one token each -> [Delta]; what has ended leaves at once

One thread owns an engine. Greedy answers are token for token those of `model.generate`.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayllava.generate.answer import Answer
from rayllava.generate.rows import Rows
from rayllava.generate.sampling import pick
from rayllava.model.normalise import normalise
from rayllava.prompt.encode import Processor
from rayllava.records import Delta, Request, Sample


class Engine:
    """Answers requests, any number at a time, `max_batch` of them at once."""

    def __init__(self, model: Any, processor: Processor, *, max_batch: int = 16) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch} leaves no room for a request; use at least 1")
        self.model = model.eval()
        self.processor = processor
        self.max_batch = max_batch
        self.context = model.config.text_config.max_position_embeddings
        """Most positions of prompt and answer together."""
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._rows: Rows | None = None
        """The rows of the running answers, in their order."""
        self._aborted: list[Delta] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._aborted)

    @property
    def num_open(self) -> int:
        """Requests that are waiting or running."""
        return len(self._waiting) + len(self._running)

    def submit(self, request: Request) -> None:
        """Queue a request; ValueError when it cannot be answered: bad pictures or knobs, too long a prompt."""
        _check(request)
        if any(answer.id == request.id for answer in (*self._waiting, *self._running)):
            raise ValueError(f"request {request.id} is being answered already; give each its own id")
        prompt = self.processor.encode(Sample(request.id, request.turns, request.images), open_turn=True)
        if len(prompt.ids) >= self.context:
            raise ValueError(
                f"request {request.id} takes {len(prompt.ids)} positions of the model's {self.context}; shorten it"
            )
        self._waiting.append(Answer(request, prompt, self.processor, context=self.context))

    def cancel(self, id: str) -> None:
        """Give a request up and free its row; the next step says so. One that has ended is left alone."""
        for answer in (*self._waiting, *self._running):
            if answer.id == id:
                self._aborted.append(answer.abort())
        self._waiting = deque(answer for answer in self._waiting if not answer.finish)
        self._drop_ended()

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Let every running answer grow by a token and admit waiting requests; return what was said."""
        deltas, self._aborted = self._aborted, []
        if self._rows is not None:
            logits = self._rows.step(self.model, [answer.tokens[-1] for answer in self._running])
            deltas += _take(self._running, logits)
            self._drop_ended()
        room = self.max_batch - len(self._running)
        admitted = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        if admitted:
            rows, logits = self._prefill(admitted)
            deltas += _take(admitted, logits)
            self._running += admitted
            if self._rows is None:
                self._rows = rows
            else:
                self._rows.join(rows)
            self._drop_ended()
        return deltas

    def generate(self, requests: Iterable[Request]) -> Iterator[Delta]:
        """Answer all requests, which are drawn only as there is room; for an engine that does nothing else."""
        assert not self.has_work, f"{self.num_open} submitted requests would lose their answers"
        source = iter(requests)
        drained = False
        try:
            while self.has_work or not drained:
                while not drained and self.num_open < self.max_batch:
                    request = next(source, None)
                    drained = request is None
                    if request is not None:
                        self.submit(request)
                yield from self.step()
        finally:  # whoever stops listening, or gave a bad request, leaves nothing behind
            for answer in (*self._waiting, *self._running):
                self.cancel(answer.id)
            self._aborted.clear()

    def _prefill(self, answers: list[Answer]) -> tuple[Rows, Tensor]:
        """Read the prompts of new answers; return their rows and the logits of their first tokens."""
        device = self.model.device
        length = max(len(answer.prompt.ids) for answer in answers)
        ids = np.full((len(answers), length), self.processor.spec.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(answers), length), dtype=np.int64)
        for row, answer in enumerate(answers):
            start = length - len(answer.prompt.ids)
            ids[row, start:], mask[row, start:] = answer.prompt.ids, 1
        rows = Rows(torch.from_numpy(mask).to(device))
        pictures = [picture for answer in answers for picture in answer.prompt.pixels]
        return rows, rows.prefill(self.model, torch.from_numpy(ids).to(device), self._features(pictures))

    def _features(self, pictures: list[np.ndarray]) -> list[Tensor]:
        """Return the projected features (P, D) of every picture; equal pictures are encoded once."""
        if not pictures:
            return []
        digests = [hashlib.blake2b(picture.tobytes()).digest() for picture in pictures]
        once = dict(zip(digests, pictures, strict=True))
        pixels = torch.from_numpy(np.stack(list(once.values()))).to(self.model.device)
        pixels = normalise(pixels, self.processor.spec, dtype=self.model.dtype)  # (N, 3, S, S)
        found = self.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        by_digest = dict(zip(once, found, strict=True))
        return [by_digest[digest] for digest in digests]

    def _drop_ended(self) -> None:
        stay = [row for row, answer in enumerate(self._running) if not answer.finish]
        if len(stay) == len(self._running):
            return
        self._running = [self._running[row] for row in stay]
        if not stay:
            self._rows = None
        elif self._rows is not None:
            self._rows.keep(stay)


def _take(answers: list[Answer], logits: Tensor) -> list[Delta]:
    tokens = pick(logits, [answer.sampler for answer in answers])
    return [answer.take(token) for answer, token in zip(answers, tokens, strict=True)]


def _check(request: Request) -> None:
    if request.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={request.max_new_tokens} asks for no answer; use at least 1")
    if request.temperature < 0:
        raise ValueError(f"temperature={request.temperature} is negative; use 0 for greedy or more")
    if not 0 < request.top_p <= 1:
        raise ValueError(f"top_p={request.top_p} is outside of 0 < top_p <= 1")
    if "" in request.stop:
        raise ValueError("stop holds an empty string, which would end every answer at once")
