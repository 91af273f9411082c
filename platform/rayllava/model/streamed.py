"""StoredModel -> module that reads a layer's weights when it runs and lets go of them afterwards.

In float32, and slowly: every forward pass reads the whole model. What it computes is what rayllava.model.restore's
module computes; what it takes is the memory of its largest layer, so that a model may be larger than the memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayllava.checkpoint.layouts import TABLES, StoredModel
from rayllava.checkpoint.weights import Held

_ROWS = 1 << 13
"""Rows of a matrix that are float32 at a time."""


def streamed(stored: StoredModel) -> Any:
    """Return the model on the CPU in evaluation mode, none of its weights read.

    Raises ValueError when a tensor is missing, strange or of another shape.
    """
    from transformers import LlavaForConditionalGeneration

    weights = dict(stored.weights)
    if stored.config.text_config.tie_word_embeddings:
        weights[TABLES[1]] = weights[TABLES[0]]
    return streamed_module(
        lambda: LlavaForConditionalGeneration(stored.config), weights, said=str(stored.tokenizer_dir)
    )


def streamed_module(make: Callable[[], Any], weights: Mapping[str, Held], *, said: str) -> Any:
    """Return what `make` makes, reading its parameters as `streamed` does; `said` begins a message."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        made = make().float()
    expected = {name: tuple(parameter.shape) for name, parameter in made.named_parameters(remove_duplicate=False)}
    for name in sorted(expected.keys() | weights.keys()):
        have = weights[name].shape if name in weights else None
        if expected.get(name) != have:
            raise ValueError(f"{said}: {name} is {have}, the model has {expected.get(name)}")
    for name, module in made.named_modules():
        prefix = f"{name}." if name else ""
        own = {key: weights[f"{prefix}{key}"] for key, _ in module.named_parameters(recurse=False)}
        if isinstance(module, nn.Linear | nn.Embedding):
            vars(module)["forward"] = (_Linear if isinstance(module, nn.Linear) else _Embedding)(own)
        elif own:
            module.register_forward_pre_hook(_Fetch(own))
            module.register_forward_hook(_drop)
    return made.eval().requires_grad_(False)


class _Linear:
    def __init__(self, own: Mapping[str, Held]) -> None:
        self.weight, self.bias = own["weight"], own.get("bias")

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.read(), self.bias.read().float() if self.bias else None
        if len(weight) <= _ROWS:
            return F.linear(x, weight.float(), bias)
        parts = [F.linear(x, rows.float()) for rows in weight.split(_ROWS)]
        made = torch.cat(parts, -1)
        return made if bias is None else made + bias


class _Embedding:
    def __init__(self, own: Mapping[str, Held]) -> None:
        self.weight = own["weight"]

    def __call__(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight.read()).float()


class _Fetch:
    def __init__(self, own: Mapping[str, Held]) -> None:
        self.own = own

    def __call__(self, module: nn.Module, args: Any) -> None:
        for key, held in self.own.items():
            setattr(module, key, nn.Parameter(held.read().float(), requires_grad=False))


def _drop(module: nn.Module, args: Any, output: Any) -> None:
    for key, parameter in module.named_parameters(recurse=False):
        setattr(module, key, nn.Parameter(parameter.to("meta"), requires_grad=False))
    _give_back()


@cache
def _libc() -> Any:
    found = ctypes.CDLL(None)
    return found if hasattr(found, "malloc_trim") else None


def _give_back() -> None:
    """Return to the system what earlier layers needed: the C library would keep it, in pieces of all sizes."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)
