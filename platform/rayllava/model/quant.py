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


def quantize(
    model: Any, kind: Quant, *, device: torch.device | str = "cpu", training: torch.dtype | None = None
) -> list[str]:
    """Replace the language model's linear layers in place and return their names.

    Each layer is packed on `device` and stays there, so that a model which fits there only when packed can be
    loaded. The rest of the model does not move. Afterwards the model must not be cast to another dtype.

    With `training`, for NF4 alone, the layers compute in that type and their packed weights are stored in tensors
    of it: ZeRO-3 parts and gathers only tensors of one type.
    """
    check_quant(kind)
    if kind == "none":
        return []
    assert kind == "nf4" or training is None, f"{kind} is no kind to train on"
    body = model.model.language_model
    names = [name for name, module in body.named_modules() if type(module) is nn.Linear]
    assert names, f"{type(body).__name__} has no linear layer to quantize"
    for name in names:
        layer = body.get_submodule(name)
        body.set_submodule(name, _nf4(layer, device, training) if kind == "nf4" else _int8(layer, device))
    # The CPU kernels work on evaluated modules only; in training mode every call unpacks all weights.
    model.eval()
    log.info("quantized %d layers to %s", len(names), kind)
    return [f"model.language_model.{name}" for name in names]


def rest(model: nn.Module) -> None:
    """Switch off dropout and all else that only training does, in a model that goes on training afterwards.

    NF4 layers stay in training mode: evaluated on a CPU they would rewrite their weights into another layout.
    """
    model.eval()
    for module in model.modules():
        if hasattr(module, "quant_state"):
            module.train()


def check_quant(kind: str) -> None:
    """Raise ValueError when there is no such precision."""
    if kind not in get_args(Quant):
        raise ValueError(f"quant={kind} is none of {', '.join(get_args(Quant))}")


def _nf4(layer: nn.Linear, device: torch.device | str, training: torch.dtype | None) -> nn.Module:
    import bitsandbytes

    bnb: Any = bitsandbytes.nn

    weight = layer.weight.data if training is None else layer.weight.data.to(training)
    storage = training or torch.uint8
    made = bnb.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        compress_statistics=True,
        quant_storage=storage,
        device="meta",
    )
    made.weight = bnb.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, quant_storage=storage, module=made
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
    num_bytes = made.weight.numel() * made.weight.element_size()
    assert num_bytes <= layer.weight.numel(), f"{num_bytes} bytes for {layer.weight.numel()} packed weights"
    return made.eval()
