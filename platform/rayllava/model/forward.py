"""Batch -> loss: pictures through tower and projector, tokens through the language model, targets through the head.

Written out instead of calling the model's own forward, for three reasons: the frozen tower runs without a
graph; the vision branch runs on every rank even where an atom has no picture; the head sees targets only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayllava.model import attention
from rayllava.model.normalise import normalise
from rayllava.recipe import ProcessorSpec
from rayllava.records import IGNORE, Batch


class LossModel(nn.Module):
    """A LLaVA whose forward is the loss summed over the targets of a batch."""

    def __init__(self, llava: Any, spec: ProcessorSpec) -> None:
        super().__init__()
        self.llava = llava
        self.spec = spec
        attention.use(llava.model.language_model)
        self.tower_trains = any(p.requires_grad for p in llava.model.vision_tower.parameters())

    def recompute(self) -> None:
        """Compute activations of the language model, and of a tower that trains, anew in the backward pass."""
        parts = [self.llava.model.language_model, *[self.llava.model.vision_tower] * self.tower_trains]
        for part in parts:
            part.activation_checkpointing_enable({"use_reentrant": False})
            # transformers makes the embeddings ask for gradients, which only the reentrant kind needs.
            part.disable_input_require_grads()

    def forward(
        self, ids: Tensor, labels: Tensor, positions: Tensor, lengths: Tensor, pixels: Tensor, packed: bool = False
    ) -> Tensor:
        """Return the summed cross-entropy of all target positions, a scalar in float32.

        ids, labels, positions (B, T) int64; lengths (B,); pixels (N, 3, S, S) uint8, N may be 0; `packed` says
        that the examples share one row.
        """
        hidden = self.hidden(ids, positions, lengths, pixels, packed)  # (B, T, D)
        targets = labels[:, 1:] != IGNORE
        logits = self.llava.lm_head(hidden[:, :-1][targets])  # (targets, rows)
        # Nobody says `<image>` or `<pad>`: without their rows the loss is that of the model as it came, and of the
        # projects that train it so.
        logits = logits[:, : self.llava.num_own_rows]
        return F.cross_entropy(logits.float(), labels[:, 1:][targets], reduction="sum")

    def hidden(self, ids: Tensor, positions: Tensor, lengths: Tensor, pixels: Tensor, packed: bool = False) -> Tensor:
        """Return the language model's last hidden states, (B, T, D)."""
        body = self.llava.model
        embeds = self.llava.get_input_embeddings()(ids)  # (B, T, D)
        features = self.image_features(pixels, dtype=embeds.dtype)  # (max(N, 1), P, D)
        if len(pixels):
            at = (ids == self.spec.image_token_id).unsqueeze(-1)
            assert int(at.sum()) == features.shape[0] * features.shape[1], "image tokens and features differ"
            embeds = embeds.masked_scatter(at, features)
        else:
            # ZeRO-3 gathers in lockstep: a rank that skipped the vision branch would hang the others.
            embeds = embeds + 0.0 * features.sum()
        assert not packed or len(ids) == 1, f"{len(ids)} rows where a packed one stands alone"
        # Given no mask, no cache and positions that begin again, every attention of transformers keeps the examples
        # of a packed row apart itself, each in the form its kernel wants; ours is also told where to cut.
        seen = body.language_model(
            inputs_embeds=embeds,
            attention_mask=None if packed else (positions < lengths.unsqueeze(1)).long(),
            position_ids=positions,
            use_cache=False,
            **({"sizes": attention.sizes(positions)} if packed else {}),
        )
        return seen.last_hidden_state

    def image_features(self, pixels: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Return projected patch features; for no picture at all, those of one zero picture."""
        body, config = self.llava.model, self.llava.config
        if not len(pixels):
            size = self.spec.image_size
            pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=pixels.device)
        layer = config.vision_feature_layer
        with torch.set_grad_enabled(self.tower_trains and torch.is_grad_enabled()):
            # Only the wanted hidden state is kept: those of all blocks of a large tower are gigabytes.
            seen = body.vision_tower(normalise(pixels, self.spec, dtype=dtype), output_hidden_states=[layer])
            states = seen.hidden_states[layer]  # (N, P + 1, C)
        if config.vision_feature_select_strategy == "default":
            states = states[:, 1:]
        return body.multi_modal_projector(states.to(dtype))


def tensors(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Return the forward's arguments on a device. They are copies: what came through Arrow is read-only."""
    return {
        "ids": torch.tensor(batch.ids, dtype=torch.int64, device=device),
        "labels": torch.tensor(batch.labels, dtype=torch.int64, device=device),
        "positions": torch.tensor(batch.positions, dtype=torch.int64, device=device),
        "lengths": torch.tensor(batch.lengths, dtype=torch.int64, device=device),
        "pixels": torch.tensor(batch.pixels, device=device),
        "packed": batch.packed,
    }
