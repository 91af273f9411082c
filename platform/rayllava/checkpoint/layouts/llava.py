"""LLaVA's own layout (haotian-liu/LLaVA, and InternVL's fork of it), read only.

mm_projector.bin                                stage 1: a folder that holds it, or the file itself
config.json  *.safetensors | *.bin              a whole model: `mm_vision_tower` in its config.json
adapter_model.*  non_lora_trainables.bin        adapters on the language model, and the projector

model.layers.*  lm_head.weight                  language model
model.mm_projector.0.weight                     projector
model.vision_tower.vision_tower.*               tower: counts only if `unfreeze_mm_vision_tower` says so
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from rayllava.checkpoint.layouts import Found, Layout, Own, Weight
from rayllava.checkpoint.layouts._adapters import read_adapter
from rayllava.checkpoint.layouts._hf_names import COMPUTED
from rayllava.checkpoint.layouts._projector import projector_name
from rayllava.checkpoint.weights import Held, has_weights, open_weights, read_config, weight_files

log = logging.getLogger(__name__)

_PROJECTOR = "mm_projector.bin"
_TRAINED = "non_lora_trainables.bin"
_TOWER = "vision_tower.vision_tower."

_ASPECTS: dict[str, Literal["pad", "crop"]] = {"pad": "pad", "square": "crop"}
_SELECTS: dict[str, Literal["default", "full"]] = {"patch": "default", "cls_patch": "full"}
"""LLaVA's words, and ours. It pads in stage 2 and when a model is asked."""


def detect(path: Path) -> bool:
    if path.is_file():
        return any("mm_projector." in name for name in _names(path))
    if (path / _PROJECTOR).is_file() or ((path / "adapter_config.json").is_file() and (path / _TRAINED).is_file()):
        return True
    return "mm_vision_tower" in read_config(path)


def find(path: Path, *, field: str = "MODEL") -> Found:
    """Find the projector, the adapters, or the whole model that a file or folder holds."""
    if (path / "adapter_config.json").is_file() and (path / _TRAINED).is_file():
        adapter, found = read_adapter(path)
        added = [Weight("llm", name, product, said, adds=True) for name, said, product in found]
        whole = _weights(open_weights(path / _TRAINED), tower=False)
        return Found((*adapter, path / _TRAINED), (*added, *whole))
    if path.is_file() or (path / _PROJECTOR).is_file():
        files = [path if path.is_file() else path / _PROJECTOR]
        return Found(tuple(files), tuple(_weights(open_weights(files[0]), tower=False)))
    files = weight_files(path, field=field)
    tower = bool(read_config(path).get("unfreeze_mm_vision_tower"))
    weights = [weight for file in files for weight in _weights(open_weights(file), tower=tower)]
    return Found((path / "config.json", *files), tuple(weights))


def own(path: Path) -> Own:
    """Return what config.json says: how the tower is used, and the language model unless only adapters are there."""
    folder = path if path.is_dir() else path.parent
    config = read_config(folder)
    aspect, select = config.get("image_aspect_ratio", "square"), config.get("mm_vision_select_feature", "patch")
    if aspect not in _ASPECTS or select not in _SELECTS:
        said = f"image_aspect_ratio={aspect}, mm_vision_select_feature={select}"
        raise ValueError(f"{folder} was trained with {said}, which is not done here; a model of LLaVA 1.5 is wanted")
    whole = path.is_dir() and has_weights(path)
    words = {key: value for key, value in config.items() if not key.startswith(("mm_", "image_", "tokenizer_"))}
    return Own(
        llm=path if whole else None,
        words=words | {"model_type": "llama"} if whole else None,
        tower=config.get("mm_vision_tower") or "",
        layer=config.get("mm_vision_select_layer", -2),
        select=_SELECTS[select],
        aspect=_ASPECTS[aspect],
    )


def _weights(held: dict[str, Held], *, tower: bool) -> Iterator[Weight]:
    """Yield the weights of a file; those of a tower that LLaVA takes from elsewhere are left out."""
    left_out = 0
    for said, tensor in held.items():
        name = said.removeprefix("base_model.model.")
        if name.endswith(COMPUTED):
            continue
        if "mm_projector." in name:
            yield Weight("projector", projector_name(name.partition("mm_projector.")[2]), tensor, said)
        elif _TOWER in name:
            if tower:
                inner = name.partition(_TOWER)[2].removeprefix("vision_model.")
                yield Weight("vision", inner, tensor, said)
            left_out += not tower
        else:
            yield Weight("llm", name, tensor, said)
    if left_out:
        log.info("left out %d tensors of a tower that was not trained; model.vision is used", left_out)


def _names(path: Path) -> list[str]:
    try:
        return list(open_weights(path))
    except ValueError:  # not a file of weights alone
        return []


PLUG = Layout(detect=detect, open=find, own=own)
