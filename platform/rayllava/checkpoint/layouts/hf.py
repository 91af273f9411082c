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
from pathlib import Path
from typing import Any

from rayllava import durable
from rayllava.checkpoint.layouts import Found, Layout, StoredModel, Weight, part_of, rounded
from rayllava.checkpoint.layouts._hf_names import canonical, published
from rayllava.checkpoint.layouts._hf_prompt import describe, own_rows, write_prompt
from rayllava.checkpoint.layouts._words import llm_words, part_words
from rayllava.checkpoint.manifest import ModelManifest
from rayllava.checkpoint.shards import write_weights
from rayllava.checkpoint.weights import Held, dtype_name, open_weights, read_config, weight_files
from rayllava.recipe import ProcessorSpec

log = logging.getLogger(__name__)


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
    rows = held[_EMBED].shape[0]
    config.text_config.vocab_size = rows
    return StoredModel(
        config,
        held,
        tokenizer_dir=folder,
        dtype=held[_EMBED].dtype,
        num_own_rows=read_config(folder, "manifest.json").get("num_own_rows") or own_rows(folder, rows),
    )


def find(path: Path, *, field: str = "MODEL") -> Found:
    """Find the weights of a whole model; they are named as transformers' classes name them."""
    weights = [Weight(*part_of(name), held, said) for name, said, held in _open(path, field=field)]
    return Found(tuple(weight_files(path, field=field)), tuple(weights), translated=True)


def named(stored: StoredModel, dtype: str | None) -> dict[str, Held]:
    """Return the tensors under the names that every reader knows."""
    tower = stored.config.vision_config.model_type
    return {published(name, tower): held for name, held in _checked(rounded(stored, dtype)).items()}


def fill(folder: Path, stored: StoredModel, manifest: ModelManifest, dtype: str | None) -> dict[str, str]:
    """Write a whole model."""
    files = write_weights(folder, named(stored, dtype))
    stored = rounded(stored, dtype)
    durable.write_json(folder / "config.json", _config_json(stored, manifest.processor))
    write_prompt(folder, stored, manifest.processor)
    log.info("wrote %d files with tensors, %s", len(files), dtype_name(stored.dtype))
    return files


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


def _checked(stored: StoredModel) -> dict[str, Held]:
    """Return the tensors a file holds; a name or shape that is not the config's model's is an error."""
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        expected = {n: tuple(t.shape) for n, t in LlavaForConditionalGeneration(stored.config).state_dict().items()}
    left_out = {"lm_head.weight"} if stored.config.tie_word_embeddings else set()
    weights = {name: held for name, held in stored.weights.items() if name not in left_out}
    for name, held in weights.items():
        if expected.get(name) != held.shape:
            raise ValueError(f"tensor {name} {held.shape} does not fit the config, which says {expected.get(name)}")
    if left := sorted(expected.keys() - weights.keys() - left_out):
        raise ValueError(f"{len(left)} tensors are missing, {left[0]} first")
    return weights


def _config_json(stored: StoredModel, spec: ProcessorSpec) -> dict[str, Any]:
    """Return config.json in words that transformers 4 and 5 both read."""
    dtype = dtype_name(stored.dtype)
    config = part_words(stored.config, dtype)
    text = config["text_config"] = llm_words(stored.config.text_config, dtype)
    config["vision_config"] = part_words(stored.config.vision_config, dtype)
    config |= {
        "architectures": ["LlavaForConditionalGeneration"],
        "vocab_size": text["vocab_size"],
        "image_token_index": spec.image_token_id,
        "image_seq_length": spec.num_image_tokens,
        "pad_token_id": spec.pad_token_id,
    }
    config.pop("image_token_id", None)
    return config


PLUG = Layout(detect=detect, open=find, named=named, fill=fill, read=read, describe=describe)
