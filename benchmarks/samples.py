"""Samples whose lengths are a law's: LLaVA-Mix-665K's, as far as it is known, at its own or a smaller scale.

The rows of each source are the published ones. Their texts' lengths are not published: medians and spreads (of a
log-normal) are assumed, from what a row of each source looks like, about 290 tokens on average beside a picture.
A picture is 576 positions; 6 % of the rows have none, and their long tail is cut at 2048.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PICTURE = 576
MAX_LENGTH = 2048


class Source(NamedTuple):
    rows: int
    median: int
    """Tokens of the text, system prompt included."""
    sigma: float
    """Standard deviation of the logarithm."""
    pictured: bool = True


SOURCES = {
    "LLaVA-Instruct": Source(157_712, 320, 0.45),
    "ShareGPT": Source(40_688, 1100, 0.9, pictured=False),
    "VQAv2": Source(82_783, 140, 0.35),
    "GQA": Source(72_140, 220, 0.5),
    "OKVQA": Source(8_998, 70, 0.3),
    "OCR-VQA": Source(80_000, 150, 0.3),
    "A-OKVQA": Source(66_160, 110, 0.3),
    "TextCaps": Source(21_953, 110, 0.3),
    "RefCOCO": Source(48_447, 330, 0.6),
    "Visual Genome": Source(86_417, 480, 0.6),
}


class Law(NamedTuple):
    """Rows drawn from the law."""

    lengths: np.ndarray
    """(N,) positions"""
    images: np.ndarray
    """(N,) 0 or 1"""


def draw(num: int, *, shrink: int = 1, seed: int = 0) -> Law:
    """Return `num` rows whose pictures and texts are `shrink` times shorter."""
    rng = np.random.default_rng(seed)
    sources = list(SOURCES.values())
    rows = np.array([source.rows for source in sources])
    which = rng.choice(len(sources), num, p=rows / rows.sum())
    normal = rng.standard_normal(num)
    medians, sigmas = (np.array([getattr(s, name) for s in sources])[which] for name in ("median", "sigma"))
    images = np.array([source.pictured for source in sources])[which].astype(np.int64)
    text = np.maximum(4, np.rint(medians * np.exp(sigmas * normal) / shrink)).astype(np.int64)
    return Law(np.minimum(text + images * (PICTURE // shrink), MAX_LENGTH // shrink), images)
