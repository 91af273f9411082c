"""What a part's folder holds, judged by its config.json: known before a weight is read.

language model   of the recipe's family, or of a kind that is translated into it
vision tower     CLIP, SigLIP, InternVL, or InternViT, which is translated
either           a LLaVA in the Hugging Face layout, of which that part is taken
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayllava.checkpoint.layouts import LAYOUTS
from rayllava.checkpoint.remap import REMAPS
from rayllava.checkpoint.weights import read_config, weight_files
from rayllava.families import FAMILIES
from rayllava.recipe import ModelSpec

TOWERS = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "internvl_vision": "InternVLVisionModel",
    "intern_vit_6b": REMAPS["intern_vit_6b"].to,
}
"""Class in transformers by `model_type`; a folder that holds a whole CLIP gives its vision half."""


INDEX = "model.safetensors.index.json"
"""Says which file holds which tensor, where there are several."""


def check_parts(model: ModelSpec) -> None:
    """Raise ValueError when the folders of a model cannot become one; the message names the field and the cure."""
    llm, vision = Path(model.llm), Path(model.vision)
    read_llm_config(llm, family=model.family)
    config = read_tower_config(vision)
    num_blocks = config.get("vision_config", config).get("num_hidden_layers")
    if num_blocks is not None:
        feature_depth(model.vision_feature_layer, num_blocks)
    weight_files(llm, field="model.llm")
    weight_files(vision, field="model.vision")


def feature_depth(layer: int, num_blocks: int) -> int:
    """Return how many blocks of a tower its feature layer depends on.

    Hidden state 0 is what enters the first block and -1 what leaves the last one. Raises ValueError when the tower
    has no such state, or none that a block has touched.
    """
    depth = layer if layer >= 0 else num_blocks + 1 + layer
    if not 1 <= depth <= num_blocks:
        raise ValueError(
            f"model.vision_feature_layer={layer}: the tower has {num_blocks} blocks; use -{num_blocks} to -1"
        )
    return depth


def read_llm_config(folder: Path, *, family: str) -> dict[str, Any]:
    """Return config.json of a language model, or what that of a whole LLaVA says of it.

    Raises ValueError when its kind is not the family's.
    """
    config = read_config(folder)
    config = config.get("text_config", {}) if is_whole(folder) else config
    if "mm_vision_tower" in config:  # a whole model of LLaVA's own, of which the language model is taken
        config = {**config, "model_type": "llama"}
    kind, plug = config.get("model_type"), FAMILIES[family]
    if kind not in (plug.model_type, plug.remap):
        fits = [name for name, other in FAMILIES.items() if kind in (other.model_type, other.remap)]
        cure = f"use one of {', '.join(fits)}" if fits else "no family has such a model"
        raise ValueError(f"model.family={family} does not fit model.llm={folder}, which is of type {kind}; {cure}")
    return config


def read_tower_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a vision tower, or what that of a whole LLaVA says of it.

    Raises ValueError when we know no such kind.
    """
    config = read_config(folder)
    config = config.get("vision_config", {}) if is_whole(folder) else config
    if config.get("model_type") not in TOWERS:
        kind, known = config.get("model_type"), ", ".join(TOWERS)
        raise ValueError(f"model.vision={folder} is of type {kind}, which is no tower here; there are: {known}")
    return config


def is_whole(folder: Path) -> bool:
    """Whether a part's folder is a whole LLaVA in the Hugging Face layout, of which the part is taken."""
    return LAYOUTS["hf"].detect(folder)
