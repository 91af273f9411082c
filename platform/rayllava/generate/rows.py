"""The attention cache of all running answers: a row each, padded on the left so that all end together.

prefill --> Rows --join--> Rows --step, step, ...--> logits
                             keep: answers that ended leave, and with them the padding only they needed
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache


class Rows:
    """Keys and values of B answers of up to T positions."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        """(B, T) int64, 1 where a position is real."""
        # Made without a config on purpose: a layer with a sliding window then keeps what is outside it too, so
        # that rows can be padded and joined; the mask hides it.
        self.cache: Any = DynamicCache()

    def prefill(self, model: Any, ids: Tensor, images: list[Tensor]) -> Tensor:
        """Read the prompts and return the logits of the first answer token, (B, V).

        ids (B, T) with padding on the left; images: projected features (P, D) of every picture in textual order.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        features: Any = images  # one (P, D) a picture, where the type says one tensor
        seen = {"image": BaseModelOutputWithPooling(pooler_output=features)} if images else None
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)  # (B, T)
        return self._forward(model, ids, positions, mm_encoder_outputs=seen)

    def step(self, model: Any, tokens: list[int]) -> Tensor:
        """Append a token to every row and return the logits of the next, (B, V)."""
        ids = torch.tensor(tokens, device=self.mask.device).unsqueeze(-1)  # (B, 1)
        positions = self.mask.sum(-1, keepdim=True)  # (B, 1)
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self._forward(model, ids, positions)

    def join(self, other: Rows) -> None:
        """Take the other's rows in below one's own."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        for rows in (self, other):
            rows._pad(length - rows.mask.shape[1])
        self.mask = torch.cat([self.mask, other.mask])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys = torch.cat([mine.keys, theirs.keys])
            mine.values = torch.cat([mine.values, theirs.values])

    def keep(self, indices: list[int]) -> None:
        """Let all rows go but these."""
        chosen = torch.tensor(indices, device=self.mask.device)
        mask = self.mask[chosen]
        start = int(mask.any(0).int().argmax())  # columns before it are padding in every row that stays
        self.mask = mask[:, start:].contiguous()
        for layer in self.cache.layers:
            layer.keys = layer.keys[chosen, :, start:].contiguous()
            layer.values = layer.values[chosen, :, start:].contiguous()

    def _forward(self, model: Any, ids: Tensor, positions: Tensor, **more: Any) -> Tensor:
        seen = model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **more,
        )
        return seen.logits[:, -1]

    def _pad(self, num: int) -> None:
        if not num:
            return
        self.mask = F.pad(self.mask, (num, 0))
        for layer in self.cache.layers:
            layer.keys = F.pad(layer.keys, (0, 0, num, 0))
            layer.values = F.pad(layer.values, (0, 0, num, 0))
