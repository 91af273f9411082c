"""What every peer does to a picture: transformers' processor for LLaVA, up to where the device takes over."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
from pictures import SIZE


def square(content: bytes | np.ndarray) -> np.ndarray:
    """Return a JPEG, or what somebody has decoded already, as (3, S, S) uint8."""
    from PIL import Image

    if isinstance(content, np.ndarray):
        return np.asarray(processor()(Image.fromarray(content))["pixel_values"][0])
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(processor()(image.convert("RGB"))["pixel_values"][0])


def squares(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"pixels": np.stack([square(content) for content in batch["jpg"]])}  # (N, 3, S, S)


@cache
def processor() -> Any:
    import torch
    from transformers import LlavaImageProcessorPil

    torch.set_num_threads(1)
    edges = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    return LlavaImageProcessorPil(**edges, do_pad=True, do_rescale=False, do_normalize=False)
