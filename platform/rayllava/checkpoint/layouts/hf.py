"""Hugging Face layout: a folder that plain transformers, vLLM and llama.cpp's scripts load.

    config.json  generation_config.json  model*.safetensors         LlavaForConditionalGeneration
    processor_config.json  preprocessor_config.json  tokenizer.*    LlavaProcessor
    chat_template.json  chat_template.jinja                         our prompt template, where jinja can say it
    manifest.json                                                   ours, written last

Tensors are written by hand under the oldest published names: what `save_pretrained` of transformers 5 writes for
a model that was built in memory is read by transformers 5 alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayllava import durable
from rayllava.checkpoint.layouts import Found, Layout, StoredModel, Weight, part_of
from rayllava.checkpoint.layouts._hf_names import canonical, published
from rayllava.checkpoint.layouts._hf_prompt import describe, write_prompt
from rayllava.checkpoint.manifest import ModelManifest, write_model_manifest
from rayllava.checkpoint.weights import Held, open_weights, read_config, weight_files
from rayllava.recipe import ProcessorSpec

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

MAX_SHARD_BYTES = 4_000_000_000

_NOISE = (
    "_name_or_path",
    "id2label",
    "label2id",
    "problem_type",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "use_cache",
)
"""What a config object carries along and no reader of a LLaVA needs."""


def detect(folder: Path) -> bool:
    config = read_config(folder)
    named = "LlavaForConditionalGeneration" in (config.get("architectures") or [])
    both = {"text_config", "vision_config"} <= config.keys()  # a whole CLIP has them too
    return named or (both and config.get("model_type") == "llava")


def read(folder: Path) -> StoredModel:
    """Return the model of a folder in any of the published spellings of tensor names."""
    from transformers import LlavaConfig

    held = {name: tensor for name, _, tensor in _open(folder)}
    config: Any = LlavaConfig.from_pretrained(folder)
    # transformers 4.37's converter wrote a vocabulary 64 larger than the tensors.
    config.text_config.vocab_size = held[_EMBED].shape[0]
    return StoredModel(config, held, tokenizer_dir=folder, dtype=held[_EMBED].dtype)


def find(path: Path, *, field: str = "MODEL") -> Found:
    """Find the weights of a whole model; they are named as transformers' classes name them."""
    weights = [Weight(*part_of(name), held, said) for name, said, held in _open(path, field=field)]
    return Found(tuple(weight_files(path, field=field)), tuple(weights), translated=True)


def write(
    folder: Path, stored: StoredModel, manifest: ModelManifest, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> ModelManifest:
    """Make `folder`, whole or not at all, and return its manifest with the digests of the tensors."""
    with durable.new_dir(folder) as beside:
        names = _write_tensors(beside, stored, max_shard_bytes)
        durable.write_json(beside / "config.json", _config_json(stored, manifest.processor))
        write_prompt(beside, stored, manifest.processor)
        manifest = manifest.but(layout="hf", files={name: durable.digest(beside / name) for name in names})
        write_model_manifest(beside, manifest)
    log.info("wrote %s: %d files with tensors, %s", folder, len(names), str(stored.dtype).removeprefix("torch."))
    return manifest


_EMBED = "model.language_model.embed_tokens.weight"


def _open(folder: Path, *, field: str = "MODEL") -> list[tuple[str, str, Held]]:
    """Return (canonical name, name in the file, tensor) of all that a folder holds."""
    found: dict[str, tuple[str, Held]] = {}
    for path in weight_files(folder, field=field):
        for said, held in open_weights(path).items():
            name = canonical(said)
            if name in found:
                raise ValueError(f"{folder} holds {name} twice: as {found[name][0]} and as {said}")
            if name:
                found[name] = (said, held)
    if _EMBED not in found:
        raise ValueError(f"{folder} holds no embedding table ({_EMBED} in any spelling); it is no whole LLaVA")
    return [(name, said, held) for name, (said, held) in found.items()]


def _write_tensors(folder: Path, stored: StoredModel, max_shard_bytes: int) -> list[str]:
    """Write the safetensors files, and an index when there are several; return their names."""
    from safetensors.torch import save_file

    tower = stored.config.vision_config.model_type
    shards: list[list[str]] = []
    num_bytes = 0
    for shard in _shards(_checked(stored), max_shard_bytes):
        named = {published(name, tower): tensor.contiguous() for name, tensor in shard}
        save_file(named, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(sorted(named))
        num_bytes += sum(t.numel() * t.element_size() for t in named.values())
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return ["model.safetensors"]
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for number, name in enumerate(names):
        (folder / f"{number}.safetensors").rename(folder / name)
    weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    durable.write_json(folder / "model.safetensors.index.json", index)
    return names


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Group tensors so that no group but that of a single giant exceeds `max_bytes`."""
    shard: list[tuple[str, Tensor]] = []
    num_bytes = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and num_bytes + size > max_bytes:
            yield shard
            shard, num_bytes = [], 0
        shard.append((name, tensor))
        num_bytes += size
    yield shard


def _checked(stored: StoredModel) -> Iterator[tuple[str, Tensor]]:
    """Stream the tensors a file holds; a name or shape that is not the config's model's is an error."""
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        expected = {n: tuple(t.shape) for n, t in LlavaForConditionalGeneration(stored.config).state_dict().items()}
    tied = stored.config.tie_word_embeddings
    left = dict(expected)
    for name, tensor in stored.tensors():
        if tied and name == "lm_head.weight":
            continue
        if left.pop(name, None) != tuple(tensor.shape):
            raise ValueError(
                f"tensor {name} {tuple(tensor.shape)} does not fit the config, which says {expected.get(name)}"
            )
        yield name, tensor.detach()
    if tied:
        left.pop("lm_head.weight", None)
    if left:
        raise ValueError(f"{len(left)} tensors are missing, {next(iter(left))} first")


def _config_json(stored: StoredModel, spec: ProcessorSpec) -> dict[str, Any]:
    """Return config.json in words that transformers 4 and 5 both read."""
    config = stored.config.to_dict()
    text = config["text_config"]
    for part in (config, text, config["vision_config"]):
        for key in _NOISE:
            part.pop(key, None)
        part["dtype"] = part["torch_dtype"] = str(stored.dtype).removeprefix("torch.")
    config |= {
        "architectures": ["LlavaForConditionalGeneration"],
        "vocab_size": text["vocab_size"],
        "image_token_index": spec.image_token_id,
        "image_seq_length": spec.num_image_tokens,
        "pad_token_id": spec.pad_token_id,
    }
    config.pop("image_token_id", None)
    rope = text.get("rope_parameters")
    if rope and "rope_theta" in rope:  # transformers 4 would silently take 10000
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        text["rope_theta"] = rope["rope_theta"]
        text["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
    return config


PLUG = Layout(detect=detect, open=find, read=read, write=write, describe=describe)
