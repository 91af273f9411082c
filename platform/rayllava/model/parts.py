"""Folder -> module: a language model or a vision tower of any project, as a class of transformers in float32.

    config.json's model_type   Llama, Phi-3, Qwen2, CLIP, SigLIP, InternVL    read by transformers
                               InternLM, InternLM2, InternViT                 translated first, see checkpoint.remap
                               a LLaVA in the Hugging Face layout             its part of it

No code from a folder is run, and no pickle: what is not safetensors is read by checkpoint.torchfile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn import functional as F

from rayllava.checkpoint.layouts import LAYOUTS, Part
from rayllava.checkpoint.parts import TOWERS, is_whole, read_llm_config, read_tower_config
from rayllava.checkpoint.remap import REMAPS, remapped
from rayllava.checkpoint.weights import stream, weight_files

POSITIONS = ("position_embedding.weight", "position_embeddings")
"""How the names of a tower's positions end: CLIP's and SigLIP's, InternVL's."""


def language_model(folder: Path, *, family: str) -> Any:
    """Return the language model in a folder, its head included.

    Raises ValueError when its kind is not the family's, or when its weights are missing, damaged or of another shape.
    """
    config = llm_config(folder, family=family)
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return _part(kind, config, folder, read_llm_config(folder, family=family), part="llm")


def vision_tower(folder: Path, *, size: int) -> Any:
    """Return the vision tower in a folder, for pictures of `size` pixels a side.

    Raises ValueError when there is no such kind of tower here, or when its weights are missing, damaged or of another
    shape.
    """
    words = read_tower_config(folder)
    kind = getattr(transformers, TOWERS[words["model_type"]])
    tower = _part(kind, tower_config(folder), folder, words, part="vision")
    _resize(tower, size)
    return tower


def llm_config(folder: Path, *, family: str) -> Any:
    """Return transformers' config of the language model in a folder; ValueError when it is not of the family."""
    words = read_llm_config(folder, family=family)
    if is_whole(folder):
        return LAYOUTS["hf"].read(folder).config.text_config
    return llm_config_of(words)


def llm_config_of(words: dict[str, Any]) -> Any:
    """Return transformers' config of a language model whose config.json says `words`."""
    if remap := REMAPS.get(words["model_type"]):
        return _config(getattr(transformers, remap.to).config_class, remap.config(words))
    return _config(transformers.CONFIG_MAPPING[words["model_type"]], words)


def _config(kind: Any, words: dict[str, Any]) -> Any:
    """Return transformers' config of a kind; ValueError when what config.json says cannot be."""
    try:
        return kind.from_dict(words)
    except (StrictDataclassError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"a config of {words.get('model_type')} is damaged: {' '.join(str(error).split())}"
        ) from error


def tower_config(folder: Path, *, size: int | None = None) -> Any:
    """Return transformers' config of the tower in a folder, for pictures of `size` pixels a side if that is given."""
    words = read_tower_config(folder)
    kind = getattr(transformers, TOWERS[words["model_type"]]).config_class
    if is_whole(folder):
        config = LAYOUTS["hf"].read(folder).config.vision_config
    elif remap := REMAPS.get(words["model_type"]):
        config = _config(kind, remap.config(words))
    else:
        config = _config(kind, words.get("vision_config", words))
    if size is not None:
        config.image_size = size if isinstance(config.image_size, int) else type(config.image_size)((size, size))
    return config


def _part(kind: Any, config: Any, folder: Path, words: dict[str, Any], *, part: Part) -> Any:
    """Return a module of the class `kind` with the weights of a folder whose config.json says `words`."""
    field = f"model.{part}"
    kinds = ["missing_keys", "mismatched_keys"]
    files = weight_files(folder, field=field)
    given: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    tensors: Iterable[tuple[str, Tensor]] | None = None
    if is_whole(folder):
        weights = LAYOUTS["hf"].open(folder, field=field).weights
        tensors = ((weight.name, weight.held.read()) for weight in weights if weight.part == part)
    elif remap := REMAPS.get(words["model_type"]):
        tensors = remapped(remap, words, stream(files))
    elif files[0].suffix != ".safetensors":
        tensors = stream(files)
    if tensors is None:
        # A whole CLIP holds more than we ask.
        model, report = kind.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, **given)
    else:
        state = {name: tensor.float() for name, tensor in tensors}
        model, report = kind.from_pretrained(None, config=config, state_dict=state, **given)
        kinds += ["unexpected_keys"] if is_whole(folder) or words["model_type"] in REMAPS else []
    _check(report, *kinds, said=f"{field}={folder}")
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
    for name in POSITIONS:
        if name in state:
            wanted = new.state_dict()[name].shape
            state[name] = interpolated(state[name].reshape(-1, wanted[-1]), wanted[-2]).reshape(wanted)
    new.load_state_dict(state)


def interpolated(table: Tensor, num: int) -> Tensor:
    """Return (num, C) position embeddings of another square grid; a class token's, in front, stays as it is."""
    has_class = int(math.isqrt(len(table)) ** 2 != len(table))
    head, grid = table[:has_class], table[has_class:]
    before, after = (math.isqrt(n - has_class) for n in (len(table), num))
    assert before**2 == len(grid) and after**2 + has_class == num, f"{len(table)} positions for {num}"
    square = grid.reshape(1, before, before, -1).permute(0, 3, 1, 2)  # (1, C, H, W)
    square = F.interpolate(square, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([head, square.permute(0, 2, 3, 1).reshape(after**2, -1)])
