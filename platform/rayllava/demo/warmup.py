"""The parts a real user would download, made on the spot: a vision tower and a language model.

Both are toys that know ten digits; neither stands for what CLIP or Vicuna can do. They are cached: a folder that is
there is not made again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from random import Random

import torch

from rayllava import durable
from rayllava.demo.language import warm_up_language
from rayllava.demo.tower import warm_up_tower

log = logging.getLogger(__name__)


def warm_up(pictures_dir: Path, out_dir: Path, *, seed: int = 0, threads: int = 2) -> dict[str, float]:
    """Make `out_dir/vision` and `out_dir/llm` and return how well each learned; whole or not at all."""
    torch.set_num_threads(threads)
    with durable.new_dir(out_dir) as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        accuracy = warm_up_tower(pictures_dir, folder / "vision", say=log.info)
        torch.manual_seed(seed)
        loss = warm_up_language(folder / "llm", rng=Random(seed), say=log.info)
    return {"vision_patch_accuracy": accuracy, "language_loss": loss}
