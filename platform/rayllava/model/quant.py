"""Float linear layers -> bitsandbytes' NF4 or int8, on the CPU as on CUDA.

Only the language model's layers change. Tower, projector, embeddings and head stay as they are: they are small,
and reading text in pictures suffers first when they are rounded.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

import torch
from torch import nn

log = logging.getLogger(__name__)

Quant = Literal["none", "nf4", "int8"]


def quantize(model: Any, kind: Quant, *, device: torch.device | str = "cpu") -> list[str]:
    """Replace the language model's linear layers in place and return their names.

    Each layer is packed on `device` and stays there, so that a model which fits there only when packed can be
    loaded. The rest of the model does not move. Afterwards the model must not be cast to another dtype.
    """
    check_quant(kind)
    if kind == "none":
        return []
    body = model.model.language_model
    names = [name for name, module in body.named_modules() if type(module) is nn.Linear]
    assert names, f"{type(body).__name__} has no linear layer to quantize"
    make = _nf4 if kind == "nf4" else _int8
    for name in names:
        body.set_submodule(name, make(body.get_submodule(name), device))
    # The CPU kernels work on evaluated modules only; in training mode every call unpacks all weights.
    model.eval()
    log.info("quantized %d layers to %s", len(names), kind)
    return [f"model.language_model.{name}" for name in names]


def check_quant(kind: str) -> None:
    """Raise ValueError when there is no such precision."""
    if kind not in get_args(Quant):
        raise ValueError(f"quant={kind} is none of {', '.join(get_args(Quant))}")


def _nf4(layer: nn.Linear, device: torch.device | str) -> nn.Module:
    import bitsandbytes

    bnb: Any = bitsandbytes.nn

    made = bnb.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        compress_statistics=True,
        device="meta",
    )
    made.weight = bnb.Params4bit(
        layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made
    )
    return _packed(made, layer, device)


def _int8(layer: nn.Linear, device: torch.device | str) -> nn.Module:
    import bitsandbytes

    bnb: Any = bitsandbytes.nn

    # It warns at its first call that it casts to float16, which is what it is for.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    made = bnb.Linear8bitLt(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        threshold=6.0,
        device="meta",
    )
    made.weight = bnb.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return _packed(made, layer, device)


def _packed(made: Any, layer: nn.Linear, device: torch.device | str) -> nn.Module:
    """Move the layer to its device, which packs the weight, and see that it did."""
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    made = made.to(device)
    assert made.weight.dtype in (torch.uint8, torch.int8), f"weight is still {made.weight.dtype}"
    return made.eval()
