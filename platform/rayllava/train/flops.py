"""What a step costs in floating point operations, and what share of the devices' peak that is: MFU.

    Cost    a model and its tuning   -> FLOPs of a position, of a pair in attention, of a target, of a picture
    Work    atoms                    -> how many of each their examples hold; padding and dummies are none
    mfu     FLOPs of a step / (its seconds * the peak of all devices)

A multiplication by P weights costs 2 P forward, 2 P more for the gradient of its input and 2 P for that of the
weights: the 6 N of PaLM (https://arxiv.org/abs/2204.02311, appendix B) where all of it is needed, 4 N where frozen
weights only pass a gradient on, 2 N in a frozen tower. Attention costs 4 D for a query and a key forward, 12 D with
its gradient (D the width of all heads): PaLM's 12 L H Q T, with T the length of each example, packed or not, and the
causal mask not taken off, as there. What is computed again in the backward pass counts once: MFU, not HFU.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from rayllava.model.tuning import feature_blocks
from rayllava.recipe import ProcessorSpec, ScaleSpec
from rayllava.records import Batch

PEAK_TFLOPS = {
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H100": 989.4,
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
}
"""Dense bfloat16 with float32 sums, 10^12 a second, by the words of torch.cuda.get_device_name; the first that fits.
From NVIDIA's data sheets, which often state twice as much for sparse weights."""
_LESS = {"MIG", "D", "Laptop"}


@dataclass(frozen=True, slots=True)
class Work:
    """How much the examples of some atoms hold."""

    tokens: int
    """Positions."""
    pairs: int
    """Squares of the examples' lengths, summed."""
    targets: int
    images: int

    @classmethod
    def of(cls, atoms: Sequence[Batch]) -> Self:
        lengths = np.concatenate([np.zeros(0, np.int64), *map(_lengths, atoms)])
        return cls(
            tokens=int(lengths.sum()),
            pairs=int((lengths**2).sum()),
            targets=sum(atom.num_targets for atom in atoms),
            images=sum(len(atom.pixels) for atom in atoms),
        )


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs of training, forward and backward."""

    position: float
    """Of one position in the language model, its head and its attention apart."""
    pair: float
    """Of one query that meets one key in all layers."""
    target: float
    """Of one target in the head."""
    image: float
    """Of one picture in tower and projector."""

    @classmethod
    def of(cls, llava: Any, processor: ProcessorSpec) -> Self:
        """Count the layers of a model that `tune` has made ready. Weights are not looked at: they may be partitioned.

        Every position asks for a gradient, since the projector trains and its features lie among the embeddings.
        A block of a tower with adapters counts its input's gradient although the first one needs none.
        """
        text = llava.config.text_config
        width = text.num_attention_heads * (getattr(text, "head_dim", None) or _head_dim(text))
        return cls(
            position=sum(_flops(layer, before=True) for layer in _linear(llava.model.language_model)),
            pair=3.0 * 4 * width * text.num_hidden_layers,
            target=_flops(llava.lm_head, before=True),
            image=_tower(llava, processor) + _projector(llava, processor),
        )

    def flops(self, *, tokens: float, pairs: float, targets: float, images: float) -> float:
        """Return the model FLOPs of a step that holds so much `Work`."""
        return self.position * tokens + self.pair * pairs + self.target * targets + self.image * images


def peak_flops(scale: ScaleSpec, device: torch.device) -> float | None:
    """Return the most FLOPs a second of one device; None where nobody has said it."""
    if scale.peak_tflops is not None:
        return 1e12 * scale.peak_tflops
    if device.type != "cuda" or scale.dtype != "bfloat16":
        return None
    known = peak_of(torch.cuda.get_device_name(device))
    return None if known is None else 1e12 * known


def peak_of(name: str) -> float | None:
    """Return a GPU's entry in PEAK_TFLOPS by its name; None for another one, a part of one or a weaker namesake."""
    words = set(re.split(r"[\s-]+", name))
    fits = (peak for key, peak in PEAK_TFLOPS.items() if words.issuperset(key.split()))
    return None if words & _LESS else next(fits, None)


def _lengths(atom: Batch) -> np.ndarray:
    if not atom.sample_ids:  # a dummy
        return np.zeros(0, np.int64)
    lengths = atom.lengths.astype(np.int64)
    return np.diff(np.flatnonzero(atom.positions[0] == 0), append=lengths[0]) if atom.packed else lengths


def _linear(module: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of a module; adapters are two of them, and NF4 layers are some too."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def _flops(layer: nn.Linear, *, before: bool) -> float:
    """Return what a position costs in a linear layer; `before` says that a gradient goes on to its input."""
    return 2.0 * layer.in_features * layer.out_features * (1 + before + layer.weight.requires_grad)


def _tower(llava: Any, processor: ProcessorSpec) -> float:
    """Return what a picture costs up to the feature layer; the blocks above it make nothing that is used."""
    tower, config = llava.model.vision_tower, llava.config.vision_config
    trains = any(parameter.requires_grad for parameter in tower.parameters())
    positions = processor.num_image_tokens + (llava.config.vision_feature_select_strategy == "default")
    blocks = feature_blocks(llava)
    total = len(blocks) * 4.0 * config.hidden_size * positions**2 * (3 if trains else 1)
    total += positions * sum(_flops(layer, before=trains) for block in blocks for layer in _linear(block))
    for conv in tower.embeddings.modules():
        if isinstance(conv, nn.Conv2d):  # of the patches; pixels want no gradient
            (height, width), (stride, _) = conv.kernel_size, conv.stride
            weights = conv.in_channels * conv.out_channels * height * width
            total += 2.0 * weights * (processor.image_size // stride) ** 2 * (1 + conv.weight.requires_grad)
    return total


def _projector(llava: Any, processor: ProcessorSpec) -> float:
    first, *others = _linear(llava.model.multi_modal_projector)
    trains = any(parameter.requires_grad for parameter in llava.model.vision_tower.parameters())
    a_position = _flops(first, before=trains) + sum(_flops(layer, before=True) for layer in others)
    return processor.num_image_tokens * a_position


def _head_dim(text: Any) -> int:
    return int(text.hidden_size // text.num_attention_heads)
