"""What GGUF files say of a model <-> configs of transformers, and the Modelfile that names both files to Ollama.

Keys and their types are those of llama.cpp's own converters: convert_hf_to_gguf.py for the language model, and
convert_image_encoder_to_gguf.py for tower and projector.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rayllava.checkpoint.gguffile import GgufTensor, Kv, Said
from rayllava.checkpoint.layouts import StoredModel
from rayllava.checkpoint.layouts._chat_words import TEMPLATES, chat_template, ollama_template, stops
from rayllava.checkpoint.layouts._gguf_tokenizer import OWN_ROWS, own_rows, said_of
from rayllava.checkpoint.parts import feature_depth
from rayllava.recipe import ProcessorSpec

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "BF16": 32}


def said_of_llm(stored: StoredModel, spec: ProcessorSpec, *, name: str, kind: str, numel: int) -> dict[str, Kv]:
    """Return what the file of a language model with `numel` numbers of type `kind` says."""
    from gguf.utility import model_weight_count_rounded_notation

    text = stored.config.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rows = text.vocab_size
    said = {
        "general.architecture": Kv("s", "llama"),
        "general.type": Kv("s", "model"),
        "general.name": Kv("s", name),
        "general.size_label": Kv("s", model_weight_count_rounded_notation(numel)),
        "llama.block_count": Kv("I", text.num_hidden_layers),
        "llama.context_length": Kv("I", text.max_position_embeddings),
        "llama.embedding_length": Kv("I", text.hidden_size),
        "llama.feed_forward_length": Kv("I", text.intermediate_size),
        "llama.attention.head_count": Kv("I", text.num_attention_heads),
        "llama.attention.head_count_kv": Kv("I", text.num_key_value_heads),
        "llama.rope.freq_base": Kv("f", (text.rope_parameters or {}).get("rope_theta", 10000.0)),
        "llama.attention.layer_norm_rms_epsilon": Kv("f", text.rms_norm_eps),
        "llama.attention.key_length": Kv("I", head),
        "llama.attention.value_length": Kv("I", head),
        "general.file_type": Kv("I", FILE_TYPES[kind]),
        "llama.vocab_size": Kv("I", rows),
        "llama.rope.dimension_count": Kv("I", head),
        "general.quantization_version": Kv("I", 2),
        OWN_ROWS: Kv("I", stored.num_own_rows),
    }
    said |= said_of(stored.tokenizer_dir, spec, rows=rows)
    begin = said["tokenizer.ggml.tokens"].value[spec.bos_token_id] if spec.bos_token_id is not None else ""
    words = chat_template(spec.template, bos_token=begin)
    return said | ({"tokenizer.chat_template": Kv("s", words)} if words else {})


def said_of_tower(stored: StoredModel, spec: ProcessorSpec, *, name: str, kind: str) -> dict[str, Kv]:
    """Return what the mmproj file says."""
    tower = stored.config.vision_config
    depth = feature_depth(stored.config.vision_feature_layer, tower.num_hidden_layers)
    if tower.hidden_act not in ("gelu", "quick_gelu"):
        raise ValueError(f"to=gguf: llama.cpp's CLIP knows gelu and quick_gelu, not {tower.hidden_act}; use to=hf")
    at = "clip.vision."
    return {
        "general.architecture": Kv("s", "clip"),
        "clip.has_text_encoder": Kv("?", False),
        "clip.has_vision_encoder": Kv("?", True),
        "clip.has_llava_projector": Kv("?", True),
        "general.file_type": Kv("I", FILE_TYPES[kind.upper()]),
        "general.name": Kv("s", f"{name}-vit"),
        "general.description": Kv("s", "image encoder for LLaVA"),
        "clip.projector_type": Kv("s", "mlp"),
        f"{at}image_size": Kv("I", spec.image_size),
        f"{at}patch_size": Kv("I", tower.patch_size),
        f"{at}embedding_length": Kv("I", tower.hidden_size),
        f"{at}feed_forward_length": Kv("I", tower.intermediate_size),
        f"{at}projection_dim": Kv("I", tower.projection_dim),
        f"{at}attention.head_count": Kv("I", tower.num_attention_heads),
        f"{at}attention.layer_norm_epsilon": Kv("f", tower.layer_norm_eps),
        # Without feature_layer llama.cpp runs one block less than there are.
        f"{at}block_count": Kv("I", depth),
        f"{at}feature_layer": Kv("[i", [depth]),
        f"{at}image_mean": Kv("[f", list(spec.image_mean)),
        f"{at}image_std": Kv("[f", list(spec.image_std)),
        "clip.use_gelu": Kv("?", tower.hidden_act == "gelu"),
    }


def modelfile(files: Iterable[str], spec: ProcessorSpec, tokenizer_dir: Path) -> str:
    """Return what `ollama create -f` reads; empty when the template's words are not known."""
    from tokenizers import Tokenizer

    template = ollama_template(spec.template)
    if template is None:
        return ""
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    ends = [tokenizer.id_to_token(id_) for id_ in spec.stop_token_ids]
    marks = dict.fromkeys([*stops(spec.template), *(end for end in ends if end)])
    lines = [*(f"FROM ./{file}" for file in files), f'TEMPLATE """{template}"""']
    system = TEMPLATES[spec.template].default
    lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f'PARAMETER stop "{mark}"' for mark in marks]
    return "\n".join([*lines, "PARAMETER num_keep 4", f"PARAMETER num_ctx {spec.max_length}"]) + "\n"


def llama_words(said: Said, tensors: dict[str, GgufTensor], path: Path) -> dict[str, Any]:
    """Return the config.json of the language model in a file; ValueError when it is no Llama."""
    kind = said.get("general.architecture")
    scaling = said.get("llama.rope.scaling.type", "none")
    if kind != "llama" or scaling != "none" or "llama.expert_count" in said or "rope_freqs.weight" in tensors:
        raise ValueError(f"{path} holds a model of kind {kind}, positions {scaling}; a plain Llama is read")
    heads, groups = heads_of(said)
    hidden = said.number("llama.embedding_length")
    words = {
        "model_type": "llama",
        "vocab_size": own_rows(said),
        "hidden_size": hidden,
        "intermediate_size": said.number("llama.feed_forward_length"),
        "num_hidden_layers": said.number("llama.block_count", most=len(tensors)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": said.number("llama.context_length"),
        "rms_norm_eps": _short(said["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _short(said.get("llama.rope.freq_base", 10000.0)),
        "head_dim": said.get("llama.attention.key_length", hidden // heads),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    return words | {f"{role}_token_id": said.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos")}


def tower_words(said: Said) -> dict[str, dict[str, Any]]:
    """Return the config.json and the preprocessor_config.json of the tower in an mmproj file, by name."""
    tower = "clip.vision."
    if (
        not said.get("clip.has_llava_projector")
        or said.get("clip.use_silu")
        or f"{tower}image_grid_pinpoints" in said
    ):
        raise ValueError(f"{said.path} is no mmproj file of a LLaVA 1.5; give one with a projector of type mlp")
    size = said.number(f"{tower}image_size", most=4096)
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": said.number(f"{tower}embedding_length"),
        "intermediate_size": said.number(f"{tower}feed_forward_length"),
        "projection_dim": said.get(f"{tower}projection_dim", 768),
        "num_hidden_layers": depth_of(said) + 1,
        "num_attention_heads": said.number(f"{tower}attention.head_count"),
        "image_size": size,
        "patch_size": said.number(f"{tower}patch_size", most=size),
        "layer_norm_eps": _short(said[f"{tower}attention.layer_norm_epsilon"]),
        "hidden_act": "gelu" if said.get("clip.use_gelu") else "quick_gelu",
    }
    pixels = {
        "crop_size": {"height": size, "width": size},
        "image_mean": [_short(value) for value in said[f"{tower}image_mean"]],
        "image_std": [_short(value) for value in said[f"{tower}image_std"]],
    }
    return {"config.json": config, "preprocessor_config.json": pixels}


def heads_of(said: Said) -> tuple[int, int]:
    """Return how many query heads a model has, and how many key heads."""
    heads = said.number("llama.attention.head_count")
    key = "llama.attention.head_count_kv"
    return heads, said.number(key, most=heads) if key in said else heads


def depth_of(said: Said) -> int:
    """Return how many of CLIP's blocks a projector depends on.

    A file without feature_layer was cut there, as LLaVA's own script does it, unless it has all of CLIP-L's blocks.
    """
    count = said.number("clip.vision.block_count", most=1000)
    layers = said.get("clip.vision.feature_layer")
    if layers and not 1 <= layers[-1] <= count:
        raise ValueError(f"{said.path} has {count} blocks, and a projector that takes what leaves block {layers[-1]}")
    if layers:
        return layers[-1]
    return count - 1 if count == 24 and said["clip.vision.embedding_length"] == 1024 else count


def _short(value: float) -> float:
    """Return the shortest number that is the same in float32: 1e-05 for 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))
