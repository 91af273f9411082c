"""What both warmed-up parts are trained with."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import OneCycleLR


class Optimizer:
    """Muon for the layers' matrices and AdamW for the rest, both on one warm-up and cosine."""

    def __init__(self, *modules: nn.Module, lr: float, num_steps: int) -> None:
        named = [pair for module in modules for pair in module.named_parameters()]
        self.params = [param for _, param in named]
        matrices = [param for name, param in named if "layers." in name and param.ndim == 2]
        rest = [param for name, param in named if not ("layers." in name and param.ndim == 2)]
        muon = Muon(matrices, lr=2 * lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        self.optims = [muon, AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
        self.schedules = [
            OneCycleLR(
                optim,
                max_lr=optim.defaults["lr"],
                total_steps=num_steps + 1,
                pct_start=0.1,
                cycle_momentum=False,
            )
            for optim in self.optims
        ]

    def step(self, loss: Tensor) -> None:
        for param in self.params:
            param.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for optim, schedule in zip(self.optims, self.schedules, strict=True):
            optim.step()
            schedule.step()
