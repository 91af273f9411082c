"""Tokens of one request -> pieces of its answer.

    token -> StreamDecoder -> text that is certain -> stop strings -> Delta

The answer is what all its tokens decode to, without special tokens, without the one space with which a template
like Vicuna's begins it, and without the stop string that ended it. Text that may turn out to be the beginning of
a stop string is held back until it is certain.
"""

from __future__ import annotations

from rayllava.generate.sampling import Sampler
from rayllava.prompt.encode import Processor
from rayllava.prompt.tokens import StreamDecoder
from rayllava.records import Delta, Example, Finish, Request


class Answer:
    """A request that is being answered."""

    def __init__(self, request: Request, prompt: Example, processor: Processor, *, context: int) -> None:
        self.id = request.id
        self.prompt = prompt
        self.sampler = Sampler(request)
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self._most = min(request.max_new_tokens, context - len(prompt.ids))
        self._stop_ids = frozenset(processor.spec.stop_token_ids)
        self._stops = request.stop
        self._decoder = StreamDecoder(processor.tokenizer)
        self._held = ""
        self._began = False

    def take(self, token: int) -> Delta:
        """Add a token and return what can be said now; `finish` is set when it was the last."""
        self.tokens.append(token)
        ended = token in self._stop_ids
        full = len(self.tokens) == self._most
        if not ended:
            self._held += self._decoder.push(token)
        if ended or full:
            self._held += self._decoder.close()
        text = self._certain(all_of_it=ended or full)
        if self.finish is None and (ended or full):
            self.finish = "stop" if ended else "length"
        return self._delta(text)

    def abort(self) -> Delta:
        self.finish = "abort"
        return self._delta("")

    def _certain(self, *, all_of_it: bool) -> str:
        """Take from the held text what no stop string can reach any more."""
        if not self._began and self._held:
            self._held = self._held.removeprefix(" ")
            self._began = True
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.finish = "stop"
            return self._held[: min(found)]
        end = len(self._held) if all_of_it else len(self._held) - self._doubtful()
        text, self._held = self._held[:end], self._held[end:]
        return text

    def _doubtful(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        return max(
            (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0
        )

    def _delta(self, text: str) -> Delta:
        return Delta(self.id, text, len(self.tokens), len(self.prompt.ids), self.finish)
