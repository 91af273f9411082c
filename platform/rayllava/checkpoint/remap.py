"""Models that came with code of their own, as the classes of transformers that compute the same.

    internlm        -> LlamaForCausalLM      names are Llama's already; every attention projection has a bias
    internlm2       -> LlamaForCausalLM      query, key and value lie in one grouped tensor
    intern_vit_6b   -> InternVLVisionModel   query, key and value lie in one tensor of three blocks

    phi3            -> LlamaForCausalLM      only where a layout knows Llama alone: transformers runs it as it is

Nothing of a model's own code is run: config.json and the tensors are translated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Config = dict[str, Any]


@dataclass(frozen=True)
class Remap:
    """How one class becomes another."""

    to: str
    """Name of the class in transformers."""
    config: Callable[[Config], Config]
    """The words of config.json -> those of the class's config."""
    tensor: Callable[[str, Tensor, Config], Iterable[tuple[str, Tensor]]]
    """A tensor and the words of config.json -> what it becomes."""


def remapped(remap: Remap, config: Config, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors under their new names."""
    for name, tensor in tensors:
        yield from remap.tensor(name, tensor, config)


_LLAMA_WORDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def _llama(config: Config) -> Config:
    """Return what the config says in words that Llama's has too."""
    return {word: config[word] for word in _LLAMA_WORDS if word in config}


def _internlm_config(config: Config) -> Config:
    # Its `rotary` may be of a kind that stretches beyond max_position_embeddings; up to there it is the plain one.
    theta = float(config.get("rotary", {}).get("base", 10000))
    return _llama(config) | {"attention_bias": bool(config.get("bias", True)), "rope_theta": theta}


def _internlm_tensor(name: str, tensor: Tensor, _: Config) -> Iterable[tuple[str, Tensor]]:
    return () if name.endswith(".rotary_emb.inv_freq") else [(name, tensor)]


_INTERNLM2 = (
    ("model.tok_embeddings.", "model.embed_tokens."),
    (".attention.wo.", ".self_attn.o_proj."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
)


def _internlm2_config(config: Config) -> Config:
    return _llama(config) | {"attention_bias": bool(config.get("bias", False))}


def _internlm2_tensor(name: str, tensor: Tensor, config: Config) -> Iterable[tuple[str, Tensor]]:
    if name.endswith(".rotary_emb.inv_freq"):
        return []
    if name.startswith("output."):
        return [(f"lm_head.{name.removeprefix('output.')}", tensor)]
    if ".attention.wqkv." in name:
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        each = heads // groups
        # For every key head: its query heads, the key head, the value head.
        grouped = tensor.view(groups, each + 2, config["hidden_size"] // heads, *tensor.shape[1:])
        slots = {"q": grouped[:, :each], "k": grouped[:, each], "v": grouped[:, each + 1]}
        return [
            (name.replace(".attention.wqkv.", f".self_attn.{x}_proj."), slot.reshape(-1, *tensor.shape[1:]))
            for x, slot in slots.items()
        ]
    for old, new in _INTERNLM2:
        name = name.replace(old, new)
    return [(name, tensor)]


def _phi3_config(config: Config) -> Config:
    # Up to its window it is the plain attention; Llama has no window.
    return _llama(config) | {"attention_bias": False}


def _phi3_tensor(name: str, tensor: Tensor, config: Config) -> Iterable[tuple[str, Tensor]]:
    if ".self_attn.qkv_proj." in name:
        each = config["hidden_size"] // config["num_attention_heads"]
        groups = config.get("num_key_value_heads") or config["num_attention_heads"]
        rows = [config["num_attention_heads"] * each, groups * each, groups * each]
        parts = zip("qkv", tensor.split(rows), strict=True)
        return [(name.replace(".qkv_proj.", f".{x}_proj."), part) for x, part in parts]
    if ".mlp.gate_up_proj." in name:
        halves = zip(("gate", "up"), tensor.chunk(2), strict=True)
        return [(name.replace(".gate_up_proj.", f".{x}_proj."), half) for x, half in halves]
    return [(name, tensor)]


_INTERN_VIT = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.q_norm.", ".attention.q_norm."),
    (".attn.k_norm.", ".attention.k_norm."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
)


def _intern_vit_config(config: Config) -> Config:
    said = config.get
    return {
        "hidden_size": said("hidden_size", 3200),
        "intermediate_size": said("intermediate_size", 12800),
        "num_hidden_layers": said("num_hidden_layers", 48),
        "num_attention_heads": said("num_attention_heads", 25),
        "num_channels": said("num_channels", 3),
        "image_size": said("image_size", 224),
        "patch_size": said("patch_size", 14),
        "hidden_act": said("hidden_act", "gelu"),
        "norm_type": said("norm_type", "rms_norm"),
        "layer_norm_eps": said("layer_norm_eps", 1e-6),
        "attention_bias": said("qkv_bias", False),
        "use_qk_norm": said("qk_normalization", True),
        "use_mean_pooling": True,  # the class then ends without a norm, as the original does
    }


def _intern_vit_tensor(name: str, tensor: Tensor, _: Config) -> Iterable[tuple[str, Tensor]]:
    for old, new in _INTERN_VIT:
        name = name.replace(old, new)
    name = re.sub(r"^encoder\.layers\.", "encoder.layer.", name)
    if name.endswith((".ls1", ".ls2")):
        return [(f"{name[:-3]}lambda_{name[-1]}", tensor)]
    if ".attn.qkv." in name:
        thirds = zip("qkv", tensor.chunk(3), strict=True)
        return [(name.replace(".attn.qkv.", f".attention.{x}_proj."), third) for x, third in thirds]
    return [(name, tensor)]


REMAPS = {
    "internlm": Remap("LlamaForCausalLM", _internlm_config, _internlm_tensor),
    "internlm2": Remap("LlamaForCausalLM", _internlm2_config, _internlm2_tensor),
    "intern_vit_6b": Remap("InternVLVisionModel", _intern_vit_config, _intern_vit_tensor),
}
"""By the `model_type` of config.json."""

AS_LLAMA = {"phi3": Remap("LlamaForCausalLM", _phi3_config, _phi3_tensor)}
"""Classes of transformers that compute what Llama computes, by `model_type`."""
