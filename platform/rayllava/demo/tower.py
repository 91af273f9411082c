"""The quickstart's vision tower: CLIP's architecture, taught which digit a patch shows, and at which place.

    training scans, drawn afresh for every step -> tower -> per patch: digit, place

The pictures of the benchmarks, and the scans in them, are never looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from rayllava.demo.optimizer import Optimizer
from rayllava.demo.pictures import LAYOUTS, Layout

SIDE = 4
"""Patches along a side of the tower's input; the digits of every layout cover whole patches."""
PATCH = 12
BLANK = 10
"""Label of a patch without a digit."""
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's image statistics."""


def warm_up_tower(
    pictures_dir: Path, out_dir: Path, *, say: Callable[[str], None], num_steps: int = 1600, batch: int = 24
) -> float:
    """Write a CLIPVisionModel and its image processor; return the share of digit patches it recognised at the end."""
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
        projection_dim=64,
    )
    tower = _newborn(config)
    # LLaVA reads the last layer but one, so that is where the labels are taught; the last layer stays as it was born.
    digit_head, place_head = nn.Linear(config.hidden_size, BLANK + 1), nn.Linear(config.hidden_size, _NUM_PLACES + 1)
    optimizer = Optimizer(tower, digit_head, place_head, lr=4e-3, num_steps=num_steps)
    drawn = _drawn_batches(pictures_dir, batch=batch)
    hits: list[float] = []
    for step in range(1, num_steps + 1):
        pixels, digits, places = next(drawn)
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]  # (B, SIDE*SIDE, D)
        logits = digit_head(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), digits.flatten())
        loss = loss + 0.3 * F.cross_entropy(place_head(hidden).flatten(0, 1), places.flatten())
        optimizer.step(loss)
        shown = digits != BLANK
        hits.append((logits.argmax(-1) == digits)[shown].float().mean().item())
        if step % 400 == 0:
            say(
                f"vision tower: step {step} of {num_steps}, {100 * np.mean(hits[-200:]):.1f} % of digit patches right"
            )
    tower.save_pretrained(out_dir)
    side = SIDE * PATCH
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[*_MEAN],
        image_std=[*_STD],
    )
    processor.save_pretrained(out_dir)
    return float(np.mean(hits[-200:]))


def _newborn(config: CLIPVisionConfig) -> CLIPVisionModel:
    """Build a tower that knows where its patches lie; from CLIP's own start a small one takes far longer to learn."""
    tower = CLIPVisionModel(config)
    frequency = math.pi / 2 * 10 ** -torch.arange(0, 1, 4 / config.hidden_size)  # (D / 4,)
    angle = torch.arange(SIDE)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (SIDE, D / 2)
    rows, columns = wave.repeat_interleave(SIDE, dim=0), wave.repeat(SIDE, 1)
    with torch.no_grad():
        tower.embeddings.position_embedding.weight[1:] = 2 * torch.cat([rows, columns], dim=1)
        for name, weight in tower.named_parameters():
            if name.endswith("patch_embedding.weight") or (".layers." in name and weight.ndim == 2):
                nn.init.xavier_uniform_(weight.view(len(weight), -1))
    return tower


def _drawn_batches(pictures_dir: Path, *, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield normalised pixels (B, 3, S, S), and digit and place of every patch (B, SIDE*SIDE), one layout a batch."""
    held_out = set(json.loads((pictures_dir / "provenance.json").read_text(encoding="utf-8"))["held_out"])
    digits = load_digits()
    kept = [i for i in range(len(digits.target)) if i not in held_out]
    scans = torch.tensor(digits.images[kept] / 16, dtype=torch.float32)[:, None]  # (N, 1, 8, 8)
    target = torch.tensor(digits.target[kept])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (_MEAN, _STD))
    while True:
        for layout in LAYOUTS:
            rows, columns = layout.rows, layout.columns
            cell = SIDE * PATCH // max(rows, columns)
            picked = torch.randint(len(target), (batch * rows * columns,))
            ink = F.grid_sample(scans[picked], _jitter(len(picked), cell), mode="bicubic", align_corners=False)
            ink = ink.clamp(0, 1).view(batch, rows, columns, cell, cell).transpose(2, 3)
            ink = ink.reshape(batch, 1, rows * cell, columns * cell)
            paper = 0.82 + 0.18 * torch.rand(batch, 3, 1, 1)
            colour = 0.4 * torch.rand(batch, 3, 1, 1)
            painted = paper + (colour - paper) * ink
            top, left = ((SIDE * PATCH - side * cell) // 2 for side in (rows, columns))
            pixels = mean.repeat(batch, 1, SIDE * PATCH, SIDE * PATCH)
            pixels[:, :, top : top + rows * cell, left : left + columns * cell] = painted
            pixels = pixels + 0.02 * torch.randn_like(pixels)
            at = patch_places(layout)
            digits = F.pad(target[picked].view(batch, rows * columns), (0, 1), value=BLANK)
            first = sum(len(other.places) for other in LAYOUTS[: LAYOUTS.index(layout)])
            where = torch.tensor([_NUM_PLACES if place is None else first + place for place in at])
            yield (pixels - mean) / std, digits[:, [-1 if p is None else p for p in at]], where.expand(batch, -1)


def _jitter(num: int, cell: int) -> Tensor:
    """Sampling grids (N, cell, cell, 2) that grow, shear, turn and move a scan a little within its cell."""
    grow = 1.0 + 0.3 * torch.rand(num, 2)
    skew = 0.15 * torch.randn(num, 2)
    move = (2 * torch.rand(num, 2) - 1) * 0.2
    theta = torch.stack([grow[:, 0], skew[:, 0], move[:, 0], skew[:, 1], grow[:, 1], move[:, 1]], dim=1)
    return F.affine_grid(theta.view(num, 2, 3), [num, 1, cell, cell], align_corners=False)


def patch_places(layout: Layout) -> list[int | None]:
    """Say for each of the tower's patches, in raster order, which place of the layout it shows."""
    patches = SIDE // max(layout.rows, layout.columns)
    top, left = (SIDE - layout.rows * patches) // 2, (SIDE - layout.columns * patches) // 2
    places: list[int | None] = []
    for y in range(SIDE):
        for x in range(SIDE):
            row, column = (y - top) // patches, (x - left) // patches
            inside = 0 <= row < layout.rows and 0 <= column < layout.columns
            places.append(row * layout.columns + column if inside else None)
    return places


_NUM_PLACES = sum(len(layout.places) for layout in LAYOUTS)
