"""What trains: which parameters get a gradient, and in which group of the optimizer.

tuning            projector   language model                        vision tower, by tuning.vision
projector         trains      frozen, float or NF4                  frozen: as it is
full              trains      trains, head and embeddings too       full: what its feature layer depends on
lora              trains      adapters on its linear layers         lora: adapters on those blocks' linear layers
qlora             trains      adapters on NF4 layers

parts --tune--> module that trains --checkpoint--> {name: tensor} --lay_over, merge--> parts
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rayllava.checkpoint.parts import feature_depth
from rayllava.families import Family
from rayllava.model.quant import quantize
from rayllava.model.seed import seed_of
from rayllava.recipe import LoRA, OptimSpec, TowerLoRA, Tuning


def tune(
    llava: Any,
    tuning: Tuning,
    family: Family,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[str]:
    """Make the model ready to train in `dtype` and return the names of the tensors that do, sorted.

    A language model that the tuning holds in NF4 is packed on `device`.
    """
    if tuning.kind == "qlora" or (tuning.kind == "projector" and tuning.quant == "nf4"):
        quantize(llava, "nf4", device=device, training=dtype)
        llava.model.language_model.is_loaded_in_4bit = True  # where peft looks for it
    return adapt(llava, tuning, family, seed=seed)


def adapt(llava: Any, tuning: Tuning, family: Family, *, seed: int) -> list[str]:
    """Do what `tune` does to the model, but leave float layers float."""
    tower = llava.model.vision_tower
    used = feature_blocks(llava)
    if isinstance(tuning, LoRA):
        _inject(llava, "model.language_model", _targets(llava.model.language_model, family), tuning, seed=seed)
    if isinstance(tuning.vision, TowerLoRA):
        inside = {id(module) for block in used for module in block.modules()}
        names = [n for n, m in tower.named_modules() if type(m) is nn.Linear and id(m) in inside]
        _inject(llava, "model.vision_tower", names, tuning.vision, seed=seed)

    llava.requires_grad_(False)
    trained: list[nn.Module] = [llava.model.multi_modal_projector]
    if tuning.kind == "full":
        trained += [llava.model.language_model, llava.lm_head]
    if tuning.vision.kind == "full":
        # The blocks above the feature layer, the last norm and a pooling head never get a gradient.
        trained += [tower.embeddings, *used, *[m for n, m in tower.named_children() if n == "pre_layrnorm"]]
    for _, layer in _adapted(llava):
        trained += [layer.lora_A, layer.lora_B]
    for module in trained:
        module.requires_grad_(True)
    return sorted(name for name, parameter in llava.named_parameters() if parameter.requires_grad)


def feature_blocks(llava: Any) -> list[nn.Module]:
    """Return the blocks of the vision tower that its chosen feature layer depends on."""
    encoder = llava.model.vision_tower.encoder
    blocks = list(encoder.layers if hasattr(encoder, "layers") else encoder.layer)
    return blocks[: feature_depth(llava.config.vision_feature_layer, len(blocks))]


def merge(llava: Any) -> None:
    """Fold every adapter into the float weight beneath it, W + alpha / r * B A, and take the adapters away."""
    for name, layer in list(_adapted(llava)):
        below = layer.get_base_layer()
        assert type(below) is nn.Linear, f"{name} is {type(below).__name__}; adapters are folded into float weights"
        layer.merge()
        llava.set_submodule(name, below)
    for part in (llava.model.language_model, llava.model.vision_tower):
        if hasattr(part, "peft_config"):
            del part.peft_config


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to by its full name: projector, vision or llm."""
    if ".multi_modal_projector." in f".{name}":
        return "projector"
    return "vision" if ".vision_tower." in f".{name}" else "llm"


def census(llava: nn.Module) -> dict[str, tuple[int, int]]:
    """Return how many tensors, and how many numbers in them, train in each part that trains."""
    found: dict[str, tuple[int, int]] = {}
    for name, parameter in llava.named_parameters():
        if parameter.requires_grad:
            tensors, numbers = found.get(part_of(name), (0, 0))
            found[part_of(name)] = (tensors + 1, numbers + parameter.numel())
    return found


def parameter_groups(model: nn.Module, optim: OptimSpec) -> list[dict[str, Any]]:
    """Return AdamW groups of the trainable parameters, projector and vision tower apart where their rates differ.

    Biases and norms get no weight decay, as in the Trainer that LLaVA used.
    """
    rates = {"projector": optim.projector_lr, "vision": optim.vision_lr, "llm": None}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = rates[part_of(name)] or optim.lr
        decay = optim.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def _targets(body: nn.Module, family: Family) -> list[str]:
    """Return the names of the linear layers that the family's adapters go on."""
    names = [name for name, module in body.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name in names if name.rpartition(".")[2] in family.lora_targets]
    lacking = set(family.lora_targets) - {name.rpartition(".")[2] for name in found}
    assert not lacking, f"{type(body).__name__} has no layer named {', '.join(sorted(lacking))}"
    return found


def _inject(llava: Any, part: str, names: list[str], spec: LoRA | TowerLoRA, *, seed: int) -> None:
    """Put adapters on the named layers of a part: A drawn, B zero, so that they change nothing yet.

    peft's own draw would come from the global generator. Ours is torch's default for linear layers, as in the
    LoRA paper's code, from a seed that each tensor has for itself.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # only ever divided by r
        lora_dropout=spec.dropout,
        bias="none",
        init_lora_weights=False,
        # Full paths: a leaf name alone also matches wherever else it occurs.
        target_modules="|".join(map(re.escape, names)),
    )
    module = llava.get_submodule(part)
    inject_adapter_in_model(config, module, low_cpu_mem_usage=True)
    adapted = dict(_adapted(module))
    assert adapted.keys() == set(names), f"adapters on {len(adapted)} layers of {part}, {len(names)} wanted"
    for name, layer in adapted.items():
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        down.weight = nn.Parameter(_drawn(down.weight.shape, seed_of(seed, "lora", f"{part}.{name}")))
        up.weight = nn.Parameter(torch.zeros(up.weight.shape))


def _drawn(shape: torch.Size, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def _adapted(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, layer) for name, layer in module.named_modules() if hasattr(layer, "lora_A"))
