"""Folder -> module: a language model or a vision tower of any project, as a class of transformers in float32.

    config.json's model_type   Llama, Phi-3, Qwen2, CLIP, SigLIP, InternVL    read by transformers
                               InternLM, InternLM2, InternViT                 translated first, see checkpoint.remap

No code from a folder is run, and no pickle is opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from rayllava.checkpoint.parts import TOWERS, read_llm_config, read_tower_config, weight_files
from rayllava.checkpoint.remap import REMAPS, remapped


def language_model(folder: Path, *, family: str) -> Any:
    """Return the language model in a folder, its head included.

    Raises ValueError when its kind is not the family's, or when its weights are not safetensors.
    """
    config = read_llm_config(folder, family=family)
    if config["model_type"] in REMAPS:
        return _translated(folder, config, field="model.llm")
    return _read(transformers.AutoModelForCausalLM, folder, field="model.llm")


def vision_tower(folder: Path, *, size: int) -> Any:
    """Return the vision tower in a folder, for pictures of `size` pixels a side.

    Raises ValueError when there is no such kind of tower here, or when its weights are not safetensors.
    """
    config = read_tower_config(folder)
    if config["model_type"] in REMAPS:
        tower = _translated(folder, config, field="model.vision")
    else:
        tower = _read(getattr(transformers, TOWERS[config["model_type"]]), folder, field="model.vision")
    _resize(tower, size)
    return tower


def _read(kind: Any, folder: Path, *, field: str) -> Any:
    weight_files(folder, field=field)
    model, report = kind.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    _check(report, "missing_keys", "mismatched_keys", said=f"{field}={folder}")  # a whole CLIP holds more than we ask
    return model


def _translated(folder: Path, config: dict[str, Any], *, field: str) -> Any:
    remap = REMAPS[config["model_type"]]
    kind: Any = getattr(transformers, remap.to)
    tensors = remapped(remap, config, _stream(weight_files(folder, field=field)))
    model, report = kind.from_pretrained(
        None,
        config=kind.config_class(**remap.config(config)),
        state_dict={name: tensor.float() for name, tensor in tensors},
        dtype=torch.float32,
        output_loading_info=True,
    )
    _check(report, "missing_keys", "mismatched_keys", "unexpected_keys", said=f"{field}={folder}")
    return model


def _check(report: dict[str, Any], *kinds: str, said: str) -> None:
    for kind in kinds:
        if report[kind]:
            first = min(map(str, report[kind]))
            raise ValueError(
                f"{said} has {len(report[kind])} {kind.replace('_', ' ')}, {first} first; give a whole model"
            )


def _resize(tower: Any, size: int) -> None:
    """Make the tower take pictures of another size: the grid of its position embeddings is interpolated.

    Bicubic, in float32, as InternVL does for its tower of 224 pixels at 336. It is done once, so that the module,
    and what is exported of it, is an ordinary tower of the new size.
    """
    config, old = tower.config, tower.embeddings
    square = not isinstance(config.image_size, int)
    if size == (config.image_size[0] if square else config.image_size):
        return
    config.image_size = type(config.image_size)((size, size)) if square else size
    tower.embeddings = new = type(old)(config)
    state = old.state_dict()
    for name in ("position_embedding.weight", "position_embeddings"):  # CLIP and SigLIP; InternVL
        if name in state:
            wanted = new.state_dict()[name].shape
            state[name] = _interpolated(state[name].reshape(-1, wanted[-1]), wanted[-2]).reshape(wanted)
    new.load_state_dict(state)


def _interpolated(table: Tensor, num: int) -> Tensor:
    """Return (num, C) position embeddings of another square grid; a class token's, in front, stays as it is."""
    has_class = int(math.isqrt(len(table)) ** 2 != len(table))
    head, grid = table[:has_class], table[has_class:]
    before, after = (math.isqrt(n - has_class) for n in (len(table), num))
    assert before**2 == len(grid) and after**2 + has_class == num, f"{len(table)} positions for {num}"
    square = grid.reshape(1, before, before, -1).permute(0, 3, 1, 2)  # (1, C, H, W)
    square = F.interpolate(square, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([head, square.permute(0, 2, 3, 1).reshape(after**2, -1)])


def _stream(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            for key in keys:
                yield key, file.get_tensor(key)
