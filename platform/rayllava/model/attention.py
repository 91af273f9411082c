"""Attention of a packed row, one example after the other: the sum of their squares, not the square of their sum.

What transformers makes of a packed row on its own is a mask over every pair of positions, all of which its kernels
then compute. Cut at the examples' starts, each piece is plain causal attention without a mask, for which every device
has its quickest kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BY_EXAMPLE = "by_example"
"""Its name among transformers' implementations."""


def use(language_model: Any) -> None:
    """Let a language model that attends through SDPA take packed rows apart; others are left as they are."""
    if language_model.config._attn_implementation == "sdpa":
        language_model.set_attn_implementation(BY_EXAMPLE)


def sizes(positions: Tensor) -> list[int]:
    """Return the lengths of the examples in a packed row of positions, (1, T), each of which begins at 0."""
    starts = torch.nonzero(positions[0] == 0).flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], positions.shape[1]], strict=True)]


def _by_example(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sizes: list[int] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Do what transformers' SDPA does, (1, heads, T, D) -> (1, T, heads, D), piece by piece if `sizes` are given."""
    if sizes is None or len(sizes) == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    found, start = [], 0
    pieces = zip(query.split(sizes, dim=2), key.split(sizes, dim=2), value.split(sizes, dim=2), strict=True)
    for size, (q, k, v) in zip(sizes, pieces, strict=True):
        end = start + size
        # A window that is shorter than the example is in the mask alone.
        cut = sliding_window is not None and size > sliding_window and attention_mask is not None
        mask = attention_mask[..., start:end, start:end] if cut else None  # type: ignore[index]
        found.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
        start = end
    return torch.cat(found, dim=1), None


AttentionInterface.register(BY_EXAMPLE, _by_example)
AttentionMaskInterface.register(BY_EXAMPLE, sdpa_mask)
