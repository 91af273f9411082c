"""llama.cpp itself, where llama-cpp-python is installed (extra `gguf`): what a file answers in it, its quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

FILE_TYPES = {"q4_k_m": 15, "q5_k_m": 17}
"""Mixtures of K-quants that only llama.cpp writes, and its numbers for them."""


def installed() -> bool:
    return find_spec("llama_cpp") is not None


def check_installed(dtype: str) -> None:
    """Raise ValueError with the cure when a type cannot be written without llama.cpp."""
    if dtype in FILE_TYPES and not installed():
        raise ValueError(f"dtype={dtype} is written by llama.cpp; pip install 'rayllava[gguf]', or use q4_0 or q5_0")


def logits_of(path: Path, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    """Return what llama.cpp gives for a text: (T, V) float32."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=max(64, len(ids) + 8), logits_all=True, verbose=False, n_gpu_layers=0)
    try:
        model.eval(list(ids))
        return np.array(model.scores[: len(ids)], np.float32)
    finally:
        model.close()


def quantized(source: Path, target: Path, dtype: str) -> None:
    """Write a model's file anew in one of FILE_TYPES."""
    import llama_cpp

    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.ftype = FILE_TYPES[dtype]
    wanted.nthread = 0
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), wanted)
    if failed:
        raise ValueError(f"llama.cpp could not write {source.name} as {dtype}; rows of a multiple of 256 are wanted")
