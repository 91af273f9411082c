"""What trains: which parameters get a gradient, and in which group of the optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from rayllava.recipe import OptimSpec, Tuning


def tune(llava: Any, tuning: Tuning) -> list[str]:
    """Freeze everything that `tuning` does not train and return the names of what it does."""
    trained: list[nn.Module] = [llava.model.multi_modal_projector]
    if tuning.kind == "full":
        trained += [llava.model.language_model, llava.lm_head]
    llava.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    names = [name for name, parameter in llava.named_parameters() if parameter.requires_grad]
    assert names, f"tuning {tuning.kind} trains nothing"
    return names


def parameter_groups(model: nn.Module, optim: OptimSpec) -> list[dict[str, Any]]:
    """Return AdamW groups of the trainable parameters, the projector apart when its rate differs.

    Biases and norms get no weight decay, as in the Trainer that LLaVA used.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        projector = "multi_modal_projector" in name
        lr = optim.projector_lr if projector and optim.projector_lr else optim.lr
        decay = optim.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]
