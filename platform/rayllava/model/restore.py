"""StoredModel -> module: a model that lies whole in a folder, as transformers' LlavaForConditionalGeneration."""

from __future__ import annotations

from typing import Any

import torch

from rayllava.checkpoint.layouts import StoredModel


def restore(stored: StoredModel, *, dtype: torch.dtype) -> Any:
    """Return the model on the CPU in evaluation mode, all floating point weights in `dtype`.

    Raises ValueError when a tensor is missing, strange or of another shape.
    """
    from transformers import LlavaForConditionalGeneration
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    loader: Any = LlavaForConditionalGeneration
    model, report = loader.from_pretrained(
        None,
        config=stored.config,
        state_dict=dict(stored.cast(dtype).tensors()),
        dtype=dtype,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            first = min(map(str, report[kind]))
            raise ValueError(f"{stored.tokenizer_dir}: {len(report[kind])} {kind.replace('_', ' ')}, {first} first")
    return model.eval()
