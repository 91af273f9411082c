"""The learning rate of step k: a pure function, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from rayllava.recipe import OptimSpec

_START = 1e-5
"""`start_factor` of XTuner's warm-up."""


def lr_factor(step: int, *, num_steps: int, optim: OptimSpec) -> float:
    """Return what the base learning rates are multiplied with at a 0-based optimizer step of `num_steps`.

    A warm-up over the fraction `optim.warmup`, then half a cosine to 0, as `optim.schedule` counts them.
    """
    if optim.schedule == "mmengine":
        return _mmengine(step, num_steps, optim)
    return _trainer(step, num_steps, optim.warmup)


def _trainer(step: int, num_steps: int, warmup: float) -> float:
    """Linear from 0 over ceil(warmup * num_steps) steps: `cosine` with `warmup_ratio` of LLaVA's Trainer.

    The first step therefore has rate 0.
    """
    num_warmup = math.ceil(warmup * num_steps)
    if step < num_warmup:
        return step / num_warmup
    return _cosine(step - num_warmup, num_steps - num_warmup)


def _mmengine(step: int, num_steps: int, optim: OptimSpec) -> float:
    """XTuner's LinearLR and CosineAnnealingLR, which mmengine moves after every micro-step.

    The first ends its way one micro-step before the second begins its own; a step is done at its last micro-step.
    """
    num_micro = num_steps * optim.micro_steps
    num_warmup = math.floor(optim.warmup * num_micro)
    micro = (step + 1) * optim.micro_steps - 1
    if micro < num_warmup:
        return _START + (1.0 - _START) * micro / max(1, num_warmup - 1)
    return _cosine(micro - num_warmup, num_micro - num_warmup)


def _cosine(done: int, length: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done / max(1, length)))
