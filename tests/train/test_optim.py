"""Learning rates against the schedulers that upstream stepped."""

from __future__ import annotations

import pytest

from rayllava.recipe import OptimSpec
from rayllava.train.optim import lr_factor


def mmengine(num_micro: int, num_warmup: int) -> list[float]:
    """Return the rate of every micro-step of XTuner's pair, by torch's chainable schedulers.

    As mmengine has it, the first ends at its last step but one, and the second then starts from where it stands.
    """
    import torch
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = LinearLR(optimizer, start_factor=1e-5, end_factor=1.0, total_iters=num_warmup - 1)
    current: LRScheduler = warmup
    rates = []
    for micro in range(num_micro):
        if micro == num_warmup:
            current = CosineAnnealingLR(optimizer, T_max=num_micro - num_warmup, eta_min=0.0)
        elif micro:
            current.step()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
    return rates


@pytest.mark.parametrize(
    ("num_steps", "micro_steps", "num_warmup"), [(200, 1, 6), (199, 2, 11), (101, 4, 12), (40, 256, 307)]
)
def test_mmengines_schedule_is_that_of_its_schedulers(num_steps: int, micro_steps: int, num_warmup: int) -> None:
    """XTuner's step takes the rate of its last micro-step."""
    want = mmengine(num_steps * micro_steps, num_warmup)[micro_steps - 1 :: micro_steps]
    optim = OptimSpec(lr=1e-3, schedule="mmengine", micro_steps=micro_steps)
    got = [lr_factor(step, num_steps=num_steps, optim=optim) for step in range(num_steps)]
    assert got == pytest.approx(want, rel=1e-9)


def test_the_trainers_schedule_is_that_of_its_scheduler() -> None:
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=7, num_training_steps=201)
    want = []
    for _ in range(201):
        want.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    got = [lr_factor(step, num_steps=201, optim=OptimSpec(lr=1e-3)) for step in range(201)]
    assert got == pytest.approx(want, rel=1e-12)
    assert got[0] == 0 and got[7] == 1


def test_the_trainer_counts_no_micro_steps() -> None:
    one, two = OptimSpec(lr=1e-3), OptimSpec(lr=1e-3, micro_steps=2)
    assert [lr_factor(k, num_steps=50, optim=one) for k in range(50)] == [
        lr_factor(k, num_steps=50, optim=two) for k in range(50)
    ]


@pytest.mark.parametrize("schedule", ["trainer", "mmengine"])
@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_a_run_of_any_length_has_finite_rates(schedule: str, warmup: float) -> None:
    for num_steps in (1, 2, 3):
        optim = OptimSpec.model_validate({"lr": 1.0, "schedule": schedule, "warmup": warmup})
        for step in range(num_steps):
            assert 0 <= lr_factor(step, num_steps=num_steps, optim=optim) <= 1
