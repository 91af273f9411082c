"""The learning rate of step k: a pure function, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math


def lr_factor(step: int, *, num_steps: int, warmup: float) -> float:
    """Return what the base learning rates are multiplied with at a 0-based step.

    Linear from 0 over ceil(warmup * num_steps) steps, then half a cosine to 0: the schedule of the Trainer that
    LLaVA used (`cosine` with `warmup_ratio`), whose first step therefore has rate 0.
    """
    num_warmup = math.ceil(warmup * num_steps)
    if step < num_warmup:
        return step / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return 0.5 * (1.0 + math.cos(math.pi * progress))
