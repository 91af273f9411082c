"""LLaVA's own layout (haotian-liu/LLaVA, and InternVL's fork of it).

mm_projector.bin                                stage 1: a folder that holds it, or the file itself
config.json  *.safetensors | *.bin              a whole model: `mm_vision_tower` in its config.json
adapter_model.*  non_lora_trainables.bin        adapters on the language model, and the projector

model.layers.*  lm_head.weight                  language model
model.mm_projector.0.weight                     projector
model.vision_tower.vision_tower.*               tower: counts only if `unfreeze_mm_vision_tower` says so

What is written is a whole model that holds its tower. LLaVA's loader asks for the tower's own folder or hub id all
the same, and takes its shape from there: vision_tower/ in the model's, unless the tower has a published name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rayllava import durable
from rayllava.checkpoint.layouts import Found, Layout, Own, StoredModel, Weight, in_whole, part_of, rounded
from rayllava.checkpoint.layouts._adapters import adapters_on, product, read_adapter, write_adapter
from rayllava.checkpoint.layouts._hf_names import COMPUTED
from rayllava.checkpoint.layouts._hf_prompt import preprocessor
from rayllava.checkpoint.layouts._llama import as_llama, check_clip
from rayllava.checkpoint.layouts._own_tokenizer import write_ends, write_own_tokenizer
from rayllava.checkpoint.layouts._projector import projector_name, sequence_name
from rayllava.checkpoint.layouts._words import llm_words, part_words
from rayllava.checkpoint.manifest import ModelManifest
from rayllava.checkpoint.shards import write_weights
from rayllava.checkpoint.weights import Held, dtype_name, has_weights, open_weights, read_config, weight_files
from rayllava.recipe import ProcessorSpec

log = logging.getLogger(__name__)

_PROJECTOR = "mm_projector.bin"
_TRAINED = "non_lora_trainables.bin"
_TOWER = "vision_tower.vision_tower."
_OWN_WORDS = ("mm_", "image_", "tokenizer_", "tune_", "freeze_", "use_mm_", "unfreeze_", "architectures", "auto_map")
"""How the words of config.json begin that are not the language model's."""
_BESIDE = "vision_tower"
"""Folder of the tower in one that we wrote."""

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
        added = [Weight("llm", name, product(one), said, one) for name, said, one in found]
        whole = _weights(open_weights(path / _TRAINED), tower=bool(read_config(path).get("unfreeze_mm_vision_tower")))
        return Found((*adapter, path / _TRAINED), (*added, *whole))
    if path.is_file() or ((path / _PROJECTOR).is_file() and not has_weights(path)):  # a whole model may have one too
        files = [path if path.is_file() else path / _PROJECTOR]
        return Found(tuple(files), tuple(_weights(open_weights(files[0]), tower=False)))
    files = weight_files(path, field=field)
    tower = bool(read_config(path).get("unfreeze_mm_vision_tower"))
    weights = [weight for file in files for weight in _weights(open_weights(file), tower=tower)]
    return Found((path / "config.json", *files), tuple(weights))


def own(path: Path, scratch: Path) -> Own:
    """Return what config.json says: how the tower is used, and the language model unless only adapters are there."""
    folder = path if path.is_dir() else path.parent
    config = read_config(folder)
    aspect, select = config.get("image_aspect_ratio", "square"), config.get("mm_vision_select_feature", "patch")
    if aspect not in _ASPECTS or select not in _SELECTS:
        said = f"image_aspect_ratio={aspect}, mm_vision_select_feature={select}"
        raise ValueError(f"{folder} was trained with {said}, which is not done here; a model of LLaVA 1.5 is wanted")
    whole = path.is_dir() and has_weights(path)
    words = {key: value for key, value in config.items() if not key.startswith(_OWN_WORDS)}
    tower = config.get("mm_vision_tower") or ""
    beside, tuned = folder / _BESIDE, bool(config.get("unfreeze_mm_vision_tower"))
    return Own(
        llm=path if whole else None,
        words=words | {"model_type": "llama"} if whole else None,
        vision=beside if has_weights(beside) or ((beside / "config.json").is_file() and tuned) else None,
        tower=tower,
        image_size=_intern_size(tower),
        layer=config.get("mm_vision_select_layer", -2),
        select=_SELECTS[select],
        aspect=_ASPECTS[aspect],
    )


def _intern_size(tower: str) -> int | None:
    """Return the side of the pictures that InternVL's fork gives its own towers, which it reads off their name."""
    if "intern" not in tower.lower() or "vit" not in tower.lower():
        return None
    return 448 if "448" in tower else 336


def carry(stored: StoredModel, dtype: str | None) -> StoredModel:
    """Return a model as LLaVA's folders hold it: a Llama with its own rows, and a CLIP."""
    check_clip(stored, layout="llava", why="LLaVA's code builds no other, and names others by their folder")
    return as_llama(rounded(stored, dtype), layout="llava").own_rows()


def named(stored: StoredModel, dtype: str | None) -> dict[str, Held]:
    """Return the tensors of a whole model under LLaVA's names."""
    held = carry(stored, dtype)
    return {_said(name): one for name, one in held.weights.items() if not _tied(name, held)}


def fill(folder: Path, stored: StoredModel, manifest: ModelManifest, dtype: str | None) -> dict[str, str]:
    """Write a whole model, its tower included."""
    held, spec = carry(stored, dtype), manifest.processor
    files = write_weights(folder, named(stored, dtype))
    ids = write_own_tokenizer(folder, held, spec)
    name = tower_id(manifest, held.config.vision_config)
    words = _words(held, spec, tower=name, tuned=True)
    words["pad_token_id"] = ids.get("pad_token", ids.get("unk_token", spec.eos_token_id))
    durable.write_json(folder / "config.json", words)
    write_ends(folder, held, spec, words["pad_token_id"])
    durable.write_json(folder / "preprocessor_config.json", preprocessor(spec.but(aspect="crop")))
    _write_beside(folder, held, spec, weights=not name)
    return files


def keep(folder: Path, stored: StoredModel, manifest: ModelManifest, found: Found) -> dict[str, str]:
    """Write adapters on the language model, and beside them all else that was trained."""
    import torch

    held, spec = carry(stored, None), manifest.processor
    added = adapters_on(found, "llm")
    if not added:
        raise ValueError("SRC holds no adapters on its language model; leave --keep-adapters out")
    if strange := [module for module in added if in_whole("llm", f"{module}.weight") not in held.weights]:
        raise ValueError(
            f"to=llava holds adapters on a Llama, which has no {strange[0]} as these have; leave --keep-adapters out"
        )
    tuned = any(weight.part == "vision" for weight in found.weights)
    name = tower_id(manifest, held.config.vision_config)
    durable.write_json(folder / "config.json", _words(held, spec, tower=name, tuned=tuned))
    parts = ("projector", "vision") if tuned else ("projector",)
    # torch.save wants them all at once: projector and tower, no language model.
    rest = {n: one.read() for n, one in held.weights.items() if part_of(n)[0] in parts}
    torch.save({f"base_model.model.{_said(n)}": tensor for n, tensor in rest.items()}, folder / _TRAINED)
    _write_beside(folder, held, spec, weights=not name)
    return {
        "adapter_model.safetensors": write_adapter(folder, added, task="CAUSAL_LM"),
        _TRAINED: durable.digest(folder / _TRAINED),
    }


def _words(held: StoredModel, spec: ProcessorSpec, *, tower: str, tuned: bool) -> dict[str, Any]:
    """Return config.json; `tower` is its published name, `tuned` says whether the checkpoint holds it."""
    config = held.config
    return llm_words(config.text_config, dtype_name(held.dtype)) | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": tower or _BESIDE,
        "mm_projector_type": f"mlp{_depth(held)}x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": _turned(_SELECTS)[config.vision_feature_select_strategy],
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": _turned(_ASPECTS)[spec.aspect],
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": tuned,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": spec.max_length,
    }


def _turned(words: dict[str, Any]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in words.items()}


def _write_beside(folder: Path, held: StoredModel, spec: ProcessorSpec, *, weights: bool) -> None:
    """Write the tower's own folder, with its weights where nobody else has them."""
    beside = folder / _BESIDE
    beside.mkdir()
    said = part_words(held.config.vision_config, dtype_name(held.dtype)) | {"architectures": ["CLIPVisionModel"]}
    durable.write_json(beside / "config.json", said)
    durable.write_json(beside / "preprocessor_config.json", preprocessor(spec.but(aspect="crop")))
    if weights:
        prefix = "model.vision_tower."
        parts = {n.replace(prefix, "vision_model."): one for n, one in held.weights.items() if n.startswith(prefix)}
        write_weights(beside, parts)


def tower_id(manifest: ModelManifest, tower: Any) -> str:
    """Return the hub id under which a tower of this shape is published, empty when there is none that we know."""
    shape = (tower.hidden_size, tower.num_hidden_layers, tower.image_size, tower.patch_size)
    known = "openai/clip-vit-large-patch14-336"
    said = manifest.parts.get("vision", "").partition("@")[0]
    if said.startswith(("openai/", "laion/")):  # LLaVA's code builds no others by their id
        return said
    return known if shape == (1024, 24, 336, 14) else ""


def _said(name: str) -> str:
    """Return what LLaVA calls a tensor."""
    part, inner = part_of(name)
    if part == "projector":
        return f"model.mm_projector.{sequence_name(inner)}"
    return f"model.{_TOWER}vision_model.{inner}" if part == "vision" else inner


def _tied(name: str, stored: StoredModel) -> bool:
    return name == "lm_head.weight" and stored.config.text_config.tie_word_embeddings


def _depth(stored: StoredModel) -> int:
    return sum(
        name.startswith("model.multi_modal_projector.") and name.endswith(".weight") for name in stored.weights
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
        log.info("left out %d tensors of a tower that was not trained; LLaVA takes it from elsewhere", left_out)


def _names(path: Path) -> list[str]:
    try:
        return list(open_weights(path))
    except ValueError:  # not a file of weights alone
        return []


PLUG = Layout(detect=detect, open=find, named=named, fill=fill, keep=keep, own=own, carry=carry)
