"""Configs of transformers -> config.json in words that transformers 4 and 5 both read."""

from __future__ import annotations

from typing import Any

NOISE = (
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
    "auto_map",  # of a model's own code, which lies elsewhere
)
"""What a config object carries along and no reader of a LLaVA needs."""


def part_words(config: Any, dtype: str) -> dict[str, Any]:
    """Return what a config says of a part whose tensors are of type `dtype`."""
    words = {key: value for key, value in config.to_dict().items() if key not in NOISE}
    words["dtype"] = words["torch_dtype"] = dtype
    rope = words.get("rope_parameters")
    if rope and "rope_theta" in rope:  # transformers 4 would silently take 10000
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        words["rope_theta"] = rope["rope_theta"]
        kind = scaling.get("rope_type", "default")
        if kind in ("linear", "dynamic"):  # old readers want these two words and no others
            scaling = {"type": kind, "factor": scaling["factor"]}
        words["rope_scaling"] = None if kind == "default" else scaling
    return words


def llm_words(config: Any, dtype: str) -> dict[str, Any]:
    """Return the config.json of a language model in a folder of its own."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return part_words(config, dtype) | {"architectures": [kind.__name__]}
