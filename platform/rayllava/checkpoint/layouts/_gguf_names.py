"""Tensors of a LLaVA <-> those of llama.cpp's two files: the language model's, and mmproj's (tower and projector).

    model.layers.0.self_attn.q_proj.weight    blk.0.attn_q.weight      rows of every head in llama.cpp's order
    encoder.layers.0.mlp.fc1.weight           v.blk.0.ffn_down.weight  the oldest names, by their shapes
    linear_1.weight                           mm.0.weight

Names are those in the part, see rayllava.checkpoint.layouts.Weight.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rayllava.checkpoint.weights import Computed, Held, trail_of

if TYPE_CHECKING:
    from torch import Tensor

_LLM = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
}
_LLM_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_VISION = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.": "v.patch_embd.",
    "embeddings.position_embedding.": "v.position_embd.",
    "pre_layrnorm.": "v.pre_ln.",
}
_VISION_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_down",
    "mlp.fc2": "ffn_up",
}
_PROJECTOR = {"linear_1.": "mm.0.", "linear_2.": "mm.2."}


def llm_name(name: str) -> str:
    """Return what llama.cpp calls a tensor of a Llama."""
    return _renamed(name, _LLM, "model.layers.", "blk.", _LLM_BLOCK)


def llm_name_back(name: str) -> str:
    return _renamed(name, _turned(_LLM), "blk.", "model.layers.", _turned(_LLM_BLOCK))


def vision_name(name: str) -> str:
    """Return what mmproj files call a tensor of a CLIP."""
    return _renamed(name, _VISION, "encoder.layers.", "v.blk.", _VISION_BLOCK)


def vision_name_back(name: str, shape: tuple[int, ...], hidden: int) -> str:
    """Return CLIP's name; the two matrices of an MLP are told apart by their shapes, whatever they are called."""
    match = re.fullmatch(r"(v\.blk\.\d+\.)(ffn_(?:up|down))\.(weight|bias)", name)
    if match:
        widens = shape[0] != hidden
        name = f"{match[1]}{'ffn_down' if widens else 'ffn_up'}.{match[3]}"
    return _renamed(name, _turned(_VISION), "v.blk.", "encoder.layers.", _turned(_VISION_BLOCK))


def projector_name(name: str) -> str:
    """Return what mmproj files call a tensor of the projector."""
    return _renamed(name, _PROJECTOR, "-", "-", {})


def projector_name_back(name: str) -> str:
    return _renamed(name, _turned(_PROJECTOR), "-", "-", {})


def permuted(name: str, held: Held, *, heads: int, groups: int, back: bool = False) -> Held:
    """Return a query's or key's tensor with its rows in llama.cpp's order, or out of it; any other as it is.

    Rotary embeddings turn pairs of rows: halves of a head in transformers, neighbours in llama.cpp.
    """
    match = re.search(r"\.(?:self_attn\.([qk])_proj|attn_([qk]))\.", name)
    if match is None:
        return held
    num = heads if "q" in (match[1], match[2]) else groups

    def make() -> Tensor:
        tensor = held.read()
        half = tensor.shape[0] // num // 2
        pairs = (num, half, 2) if back else (num, 2, half)
        return tensor.reshape(*pairs, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)

    return Computed(held.shape, held.dtype, make, trail_of(held, "rows of heads reordered"))


def _renamed(name: str, whole: dict[str, str], old: str, new: str, inner: dict[str, str]) -> str:
    """Return a tensor's other name; ValueError when it has none."""
    for begin, other in whole.items():
        if name.startswith(begin):
            return other + name.removeprefix(begin)
    match = re.fullmatch(re.escape(old) + r"(\d{1,4})\.(.+)\.(weight|bias)", name)
    if match is None or match[2] not in inner:
        raise ValueError(f"{name[:120]!a} is no tensor of a LLaVA in this layout")
    return f"{new}{match[1]}.{inner[match[2]]}.{match[3]}"


def _turned(names: dict[str, str]) -> dict[str, str]:
    return {other: name for name, other in names.items()}
