"""XTuner's layouts.

iter_2181.pth                                   a training checkpoint of mmengine: what trained, and much else
projector/  llm_adapter/  visual_encoder_adapter/  visual_encoder/  *.safetensors
                                                a LLaVA folder: each where it trained; the language model at the root
config.json  model.safetensors                  its projector/ alone

llm.model.layers.*                  model.layers.*             language model
visual_encoder.vision_model.*       vision_model.*             tower
projector.model.0.weight            model.0.weight             projector

What is written is a LLaVA folder that holds every part whole.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from rayllava import durable
from rayllava.checkpoint.layouts import Found, Layout, Own, Part, StoredModel, Weight, part_of, rounded
from rayllava.checkpoint.layouts._adapters import (
    Scale,
    adapters,
    adapters_on,
    is_adapter,
    product,
    read_adapter,
    write_adapter,
)
from rayllava.checkpoint.layouts._hf_names import COMPUTED
from rayllava.checkpoint.layouts._hf_prompt import preprocessor
from rayllava.checkpoint.layouts._llama import check_clip
from rayllava.checkpoint.layouts._own_tokenizer import write_ends, write_own_tokenizer
from rayllava.checkpoint.layouts._projector import projector_name, sequence_name
from rayllava.checkpoint.layouts._words import llm_words, part_words
from rayllava.checkpoint.manifest import ModelManifest
from rayllava.checkpoint.shards import write_weights
from rayllava.checkpoint.weights import Held, dtype_name, has_weights, open_weights, read_config, weight_files
from rayllava.recipe import ProcessorSpec

log = logging.getLogger(__name__)

_PREFIXES: tuple[tuple[str, Part, str], ...] = (
    ("llm.", "llm", "llm_lora"),
    ("visual_encoder.", "vision", "visual_encoder_lora"),
    ("projector.model.", "projector", ""),
)
"""In a .pth: how names begin, the part, and the word of the training config that speaks of its adapters."""


def detect(path: Path) -> bool:
    if path.is_file():
        return any(name.startswith("projector.model.") for name in _state(path))
    return _is_projector(path) or _is_projector(path / "projector") or _is_sharded(path)


def find(path: Path, *, field: str = "MODEL") -> Found:
    """Find what a training checkpoint or a folder holds."""
    if path.is_file():
        return Found((path,), tuple(_of_training(path)))
    if _is_sharded(path):
        raise ValueError(
            f"{field}={path} is in DeepSpeed's pieces; give the folder that `xtuner convert pth_to_hf` makes of it"
        )
    weights: list[Weight] = []
    files: list[Path] = []

    def take(folder: Path, part: Part) -> None:
        for file in weight_files(folder, field=field):
            files.append(file)
            weights.extend(_whole(part, open_weights(file)))

    def fold(folder: Path, part: Part) -> None:
        if (folder / "adapter_config.json").is_file():
            read, found = read_adapter(folder)
            files.extend(read)
            weights.extend(Weight(part, _within(part, name), product(one), said, one) for name, said, one in found)

    if _is_projector(path):
        take(path, "projector")
        return Found(tuple(files), tuple(weights))
    take(path / "projector", "projector")
    if has_weights(path):
        take(path, "llm")
    if (path / "visual_encoder").is_dir():
        take(path / "visual_encoder", "vision")
    fold(path / "llm_adapter", "llm")
    fold(path / "visual_encoder_adapter", "vision")
    return Found(tuple(files), tuple(weights))


def own(path: Path, scratch: Path) -> Own:
    """Return what a folder says of the parts that were trained as a whole; a .pth says nothing."""
    vision = path / "visual_encoder"
    whole = has_weights(path) and not _is_projector(path)
    return Own(
        llm=path if whole else None,
        words=read_config(path) if whole else None,
        vision=vision if vision.is_dir() else None,
        layer=read_config(path / "projector").get("visual_select_layer", -2),
    )


def carry(stored: StoredModel, dtype: str | None) -> StoredModel:
    """Return a model as XTuner's folders hold it: the language model with its own rows, and a CLIP."""
    check_clip(stored, layout="xtuner", why="XTuner's code builds no other")
    config = stored.config
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            "to=xtuner: this model takes the class token along, which XTuner's code always drops; use to=hf"
        )
    if config.vision_feature_layer != -2:
        log.warning("ask XTuner for this model with --visual-select-layer %d", config.vision_feature_layer)
    return rounded(stored, dtype).own_rows()


def named(stored: StoredModel, dtype: str | None) -> dict[str, Held]:
    """Return the tensors of all parts, each behind its folder."""
    inside = {"llm": "", "vision": "visual_encoder/", "projector": "projector/"}
    parts = _parts(carry(stored, dtype))
    return {f"{inside[part]}{name}": one for part, tensors in parts.items() for name, one in tensors.items()}


def fill(folder: Path, stored: StoredModel, manifest: ModelManifest, dtype: str | None) -> dict[str, str]:
    """Write a folder that holds every part whole."""
    held, spec = carry(stored, dtype), manifest.processor
    return _write_llm(folder, held, spec) | _write_tower(folder, held, spec) | _write_projector(folder, held)


def _write_llm(folder: Path, held: StoredModel, spec: ProcessorSpec) -> dict[str, str]:
    ids = write_own_tokenizer(folder, held, spec)
    durable.write_json(folder / "config.json", llm_words(held.config.text_config, dtype_name(held.dtype)))
    write_ends(folder, held, spec, ids.get("pad_token"))
    return write_weights(folder, _parts(held)["llm"])


def _write_tower(folder: Path, held: StoredModel, spec: ProcessorSpec) -> dict[str, str]:
    tensors = _parts(held)["vision"]
    dtype = dtype_name(tensors["vision_model.embeddings.class_embedding"].dtype)
    inside = folder / "visual_encoder"
    inside.mkdir()
    words = part_words(held.config.vision_config, dtype) | {"architectures": ["CLIPVisionModel"]}
    durable.write_json(inside / "config.json", words)
    durable.write_json(inside / "preprocessor_config.json", preprocessor(spec.but(aspect="crop")))
    return {f"visual_encoder/{name}": digest for name, digest in write_weights(inside, tensors).items()}


def _write_projector(folder: Path, held: StoredModel) -> dict[str, str]:
    tensors = _parts(held)["projector"]
    wide, narrow = tensors["model.0.weight"].shape
    words = {
        "architectures": ["ProjectorModel"],
        "model_type": "projector",
        "visual_hidden_size": narrow,
        "llm_hidden_size": wide,
        "depth": sum(name.endswith(".weight") for name in tensors),
        "hidden_act": "gelu",
        "bias": True,
        "torch_dtype": dtype_name(tensors["model.0.weight"].dtype),
        "visual_select_layer": held.config.vision_feature_layer,  # ours: XTuner has a flag, and takes -2 without it
    }
    inside = folder / "projector"
    inside.mkdir()
    durable.write_json(inside / "config.json", words)
    return {f"projector/{name}": digest for name, digest in write_weights(inside, tensors).items()}


_ADAPTED: tuple[Part, ...] = ("llm", "vision")


def keep(folder: Path, stored: StoredModel, manifest: ModelManifest, found: Found) -> dict[str, str]:
    """Write what was trained, as a training leaves it: parts that were trained whole, adapters of the others."""
    held, spec = carry(stored, None), manifest.processor
    added = {part: adapters_on(found, part) for part in _ADAPTED}
    whole = {weight.part for weight in found.weights if not weight.adapter}
    if not any(added.values()):
        raise ValueError("SRC holds no adapters; leave --keep-adapters out")
    files = _write_projector(folder, held)
    if added["llm"]:
        files["llm_adapter"] = write_adapter(folder / "llm_adapter", added["llm"], task="CAUSAL_LM")
    elif "llm" in whole:
        files |= _write_llm(folder, held, spec)
    if added["vision"]:
        modules = {f"vision_model.{module}": one for module, one in added["vision"].items()}
        files["visual_encoder_adapter"] = write_adapter(folder / "visual_encoder_adapter", modules, task=None)
    elif "vision" in whole:
        files |= _write_tower(folder, held, spec)
    return files


def _parts(held: StoredModel) -> dict[Part, dict[str, Held]]:
    """Return what each part's files hold."""
    parts: dict[Part, dict[str, Held]] = {"llm": {}, "vision": {}, "projector": {}}
    for name, one in held.weights.items():
        part, inner = part_of(name)
        if not (name == "lm_head.weight" and held.config.text_config.tie_word_embeddings):
            parts[part][_SAID[part](inner)] = one
    return parts


_SAID = {
    "llm": lambda name: name,
    "vision": lambda name: f"vision_model.{name}",
    "projector": lambda name: f"model.{sequence_name(name)}",
}
"""What XTuner calls a part's tensor."""


def _of_training(path: Path) -> Iterator[Weight]:
    """Yield the weights of a .pth; adapters are scaled as the training config in it says."""
    state = _state(path)
    for prefix, part, word in _PREFIXES:
        own = {name: held for name, held in state.items() if name.startswith(prefix)}
        added = {name.removeprefix(prefix): held for name, held in own.items() if is_adapter(name)}
        whole = {name: held for name, held in own.items() if not is_adapter(name)}
        if added:
            if whole:
                raise ValueError(f"{path} holds adapters of {prefix}* beside {next(iter(whole))[:120]!a}; merge them")
            for name, said, one in adapters(added, _scale(path, word), said=str(path)):
                yield Weight(part, _within(part, name), product(one), prefix + said, one)
        yield from _whole(part, whole, prefix=prefix)
    strange = [name for name in state if not name.startswith(tuple(prefix for prefix, _, _ in _PREFIXES))]
    if strange:
        raise ValueError(f"{path} holds {strange[0][:120]!a}, which is no part of a LLaVA that XTuner trains")


def _whole(part: Part, held: dict[str, Held], *, prefix: str = "") -> Iterator[Weight]:
    for said, tensor in held.items():
        if not said.endswith(COMPUTED):
            yield Weight(part, _within(part, said.removeprefix(prefix)), tensor, said)


def _within(part: Part, name: str) -> str:
    if part == "projector":
        return projector_name(name.removeprefix("model."))
    return name.removeprefix("vision_model.") if part == "vision" else name


def _scale(path: Path, word: str) -> Scale:
    """Return the scale of a .pth's adapters out of the training config in it, which is text and stays text."""
    from rayllava.checkpoint.torchfile import read

    value = read(path)
    meta = value.get("meta") if isinstance(value, dict) else None
    config = meta.get("cfg") if isinstance(meta, dict) else None
    match = re.search(rf"\b{word}=dict\(([^()]*)\)", config) if isinstance(config, str) else None
    alpha = re.search(r"\blora_alpha=(\d+(?:\.\d+)?)", match[1]) if match else None
    if match is None or alpha is None or "use_dora=True" in match[1]:
        raise ValueError(
            f"{path} holds adapters, but its training config does not say {word}.lora_alpha; "
            "give the folder that `xtuner convert pth_to_hf` makes of it"
        )
    return Scale(float(alpha[1]), "use_rslora=True" in match[1])


def _state(path: Path) -> dict[str, Held]:
    try:
        return open_weights(path)
    except ValueError:
        return {}


def _is_projector(folder: Path) -> bool:
    return read_config(folder).get("model_type") == "projector"


def _is_sharded(folder: Path) -> bool:
    """Whether it is what XTuner writes when it trains with DeepSpeed, a folder called iter_N.pth."""
    return any(folder.glob("*mp_rank_00_model_states.pt"))


PLUG = Layout(detect=detect, open=find, named=named, fill=fill, keep=keep, own=own, carry=carry)
