"""A LLaVA with random weights, made in memory."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny import processor_spec


def tiny_llava(*, seed: int = 0, kind: str = "llama", **text: Any) -> Any:
    """Return a float32 model that fits tests.tiny.processor_spec; biases and norms are random too.

    kind: llama; phi3, whose attention sees a window only; qwen2, with biases on some projections; internvl, a tower
    without `vision_model.` in its names.
    """
    from transformers import (
        CLIPVisionConfig,
        InternVLVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Phi3Config,
        Qwen2Config,
    )

    spec = processor_spec()
    llama = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    phi3 = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 50}
    clip = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    internvl = {"use_qk_norm": True, "norm_type": "rms_norm", "image_size": [28, 28], "patch_size": [14, 14]}
    texts: dict[str, Any] = {"phi3": Phi3Config, "qwen2": Qwen2Config}
    config = LlavaConfig(
        vision_config=InternVLVisionConfig(**(clip | internvl)) if kind == "internvl" else CLIPVisionConfig(**clip),
        text_config=texts.get(kind, LlamaConfig)(**(llama | (phi3 if kind == "phi3" else {}) | text)),
        image_token_index=spec.image_token_id,
        image_seq_length=spec.num_image_tokens,
        pad_token_id=spec.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
