"""uint8 pixels -> what the tower was trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from rayllava.recipe import ProcessorSpec


def normalise(pixels: Tensor, spec: ProcessorSpec, *, dtype: torch.dtype) -> Tensor:
    """Return (pixels / 255 - mean) / std of a uint8 tensor (N, 3, S, S), on its own device.

    In float32 the values equal those of the reference processors, which compute in the same order.
    """
    # 255 is a tensor because CUDA multiplies by the reciprocal of a plain number, and near the mean that shows.
    mean, std, top = (
        torch.tensor(v, dtype=torch.float32, device=pixels.device).view(1, -1, 1, 1)
        for v in (spec.image_mean, spec.image_std, [255.0])
    )
    return ((pixels.float() / top - mean) / std).to(dtype)
