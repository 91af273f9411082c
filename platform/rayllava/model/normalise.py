"""uint8 pixels -> what the tower was trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from rayllava.recipe import ProcessorSpec


def normalise(pixels: Tensor, spec: ProcessorSpec, *, dtype: torch.dtype) -> Tensor:
    """Return (pixels / 255 - mean) / std of a uint8 tensor (N, 3, S, S), on its own device."""
    mean, std = (
        pixels.new_tensor(v, dtype=torch.float32).view(1, 3, 1, 1) for v in (spec.image_mean, spec.image_std)
    )
    return ((pixels.float() / 255.0 - mean) / std).to(dtype)
