"""Logits -> token: greedy, or drawn from the request's own random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from rayllava.records import Request


class Sampler:
    """Draws one request's tokens; what its neighbours in the batch draw is of no influence."""

    def __init__(self, request: Request) -> None:
        self.temperature = request.temperature
        self.top_p = request.top_p
        self._random = torch.Generator()
        if request.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(request.seed)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def draw(self, logits: Tensor) -> int:
        """Return a token id for (V,) logits on the CPU."""
        odds = torch.softmax(logits.float() / self.temperature, dim=-1)
        if self.top_p < 1:
            ranked, order = odds.sort(descending=True)
            # The nucleus ends with the token that reaches top_p, so it is never empty.
            ranked[ranked.cumsum(0) - ranked >= self.top_p] = 0
            return int(order[torch.multinomial(ranked, 1, generator=self._random)])
        return int(torch.multinomial(odds, 1, generator=self._random))


def pick(logits: Tensor, samplers: list[Sampler]) -> list[int]:
    """Return the next token of every row of (B, V) logits."""
    tokens = logits.argmax(-1).tolist()
    for row, sampler in enumerate(samplers):
        if not sampler.greedy:
            tokens[row] = sampler.draw(logits[row].cpu())
    return tokens
