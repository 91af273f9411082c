"""Tiny language models and vision towers in the folders of their own projects, with random weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rayllava.recipe import ModelSpec

TEXT: dict[str, Any] = {
    "vocab_size": 330,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PICTURE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def model_of(llm: str, tower: str, folder: Path, tokenizer_dir: Path) -> ModelSpec:
    """Write both parts and return the spec that names them; `tower` may end in @ and the pictures' size."""
    kind, _, size = tower.partition("@")
    _write_llm(llm, folder / "llm")
    for path in tokenizer_dir.glob("*token*"):
        (folder / "llm" / path.name).write_bytes(path.read_bytes())
    _write_tower(kind, folder / "vision")
    return ModelSpec(
        llm=str(folder / "llm"),
        vision=str(folder / "vision"),
        family=llm,
        vision_feature_layer={"intern_vit_6b": -4, "internvl_vision": -1}.get(kind, -2),
        vision_feature_select="full" if kind == "siglip" else "default",
        image_size=int(size) if size else None,
    )


def _write_llm(kind: str, folder: Path) -> None:
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Phi3Config,
        Phi3ForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    if kind == "internlm":
        words = TEXT | {"num_key_value_heads": 4}
        made = _random(LlamaForCausalLM(LlamaConfig(**words, attention_bias=True)))
        own = {"model_type": "internlm", "bias": True, "rotary": {"base": 10000, "type": "dynamic"}}
        _write(folder, own | {k: v for k, v in words.items() if k != "num_key_value_heads"}, made.state_dict())
    elif kind == "internlm2":
        made = _random(LlamaForCausalLM(LlamaConfig(**TEXT, rope_theta=1e6)))
        own = {"model_type": "internlm2", "bias": False, "rope_theta": 1e6, "rope_scaling": None}
        _write(folder, own | TEXT, as_internlm2(made.state_dict()))
    elif kind == "phi3":
        _random(Phi3ForCausalLM(Phi3Config(**TEXT))).save_pretrained(folder)
    elif kind == "qwen2":
        _random(Qwen2ForCausalLM(Qwen2Config(**TEXT, tie_word_embeddings=True))).save_pretrained(folder)
    else:
        theta = {"llama3": 5e5}.get(kind, 1e4)
        _random(LlamaForCausalLM(LlamaConfig(**TEXT, rope_theta=theta))).save_pretrained(folder)


def as_internlm2(llama: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a Llama's tensors as InternLM2 stores them: a key head's queries, itself and its value together."""
    layers = TEXT["num_hidden_layers"]
    head, groups = TEXT["hidden_size"] // TEXT["num_attention_heads"], TEXT["num_key_value_heads"]
    found = {
        "model.tok_embeddings.weight": llama["model.embed_tokens.weight"],
        "model.norm.weight": llama["model.norm.weight"],
        "output.weight": llama["lm_head.weight"],
    }
    own = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for number in range(layers):
        at = f"model.layers.{number}"
        q, k, v = (llama[f"{at}.self_attn.{x}_proj.weight"] for x in "qkv")
        rows = []
        for g in range(groups):
            each = len(q) // groups
            rows += [q[g * each : (g + 1) * each], k[g * head : (g + 1) * head], v[g * head : (g + 1) * head]]
        found[f"{at}.attention.wqkv.weight"] = torch.cat(rows)
        found[f"{at}.attention.wo.weight"] = llama[f"{at}.self_attn.o_proj.weight"]
        found[f"{at}.attention_norm.weight"] = llama[f"{at}.input_layernorm.weight"]
        found[f"{at}.ffn_norm.weight"] = llama[f"{at}.post_attention_layernorm.weight"]
        for theirs, ours in own.items():
            found[f"{at}.feed_forward.{ours}.weight"] = llama[f"{at}.mlp.{theirs}.weight"]
    return found


def _write_tower(kind: str, folder: Path) -> None:
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        CLIPVisionModel,
        InternVLVisionConfig,
        InternVLVisionModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    if kind == "clip":
        _random(CLIPVisionModel(CLIPVisionConfig(**PICTURE))).save_pretrained(folder)
    elif kind == "siglip":
        _random(SiglipVisionModel(SiglipVisionConfig(**PICTURE))).save_pretrained(folder)
    elif kind == "internvl_vision":
        config = InternVLVisionConfig(**PICTURE, use_qk_norm=True, norm_type="rms_norm")
        _random(InternVLVisionModel(config)).save_pretrained(folder)
    else:
        config = InternVLVisionConfig(**PICTURE, use_qk_norm=True, norm_type="rms_norm")
        own = {"model_type": "intern_vit_6b", "qkv_bias": False, "qk_normalization": True, "layer_norm_eps": 1e-6}
        tensors = as_intern_vit(_random(InternVLVisionModel(config)).state_dict())
        _write(folder, own | PICTURE | {"hidden_act": "gelu"}, tensors)
    size = {"height": 28, "width": 28}
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]} if "intern" in kind else {}
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size, **imagenet).save_pretrained(folder)


def as_intern_vit(tower: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of transformers' class under the names of OpenGVLab's, query, key and value in one."""
    own = (
        ("embeddings.cls_token", "embeddings.class_embedding"),
        ("embeddings.position_embeddings", "embeddings.position_embedding"),
        ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
        ("encoder.layer.", "encoder.layers."),
        ("attention.projection_layer", "attn.proj"),
        ("attention.q_norm", "attn.q_norm"),
        ("attention.k_norm", "attn.k_norm"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("lambda_", "ls"),
    )
    found = {}
    for name, tensor in tower.items():
        for theirs, ours in own:
            name = name.replace(theirs, ours)
        if match := re.fullmatch(r"(.*)\.attention\.([qkv])_proj\.weight", name):
            found.setdefault(f"{match[1]}.attn.qkv.weight", {})[match[2]] = tensor  # type: ignore[index]
        else:
            found[name] = tensor
    return {n: torch.cat([t[x] for x in "qkv"]) if isinstance(t, dict) else t for n, t in found.items()}


def _random(model: Any) -> Any:
    """Move every weight: norms of one, biases of zero and layer scales of one number would hide what is mixed up."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
