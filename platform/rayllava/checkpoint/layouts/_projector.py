"""A projector as LLaVA and XTuner store it: `0.weight`, `2.bias`, ..., places in a sequence of layers and GELUs."""

from __future__ import annotations

import re


def projector_name(name: str) -> str:
    """Return transformers' name: layer 0 is `linear_1`, layer 2 `linear_2`; a bare `weight` is the first layer's.

    What stands at an odd place is no linear layer of an MLP with GELUs and keeps its name, which fits no model.
    """
    if name in ("weight", "bias"):
        return f"linear_1.{name}"
    match = re.fullmatch(r"(\d{1,3})\.(weight|bias)", name)
    if match is None or int(match[1]) % 2:
        return name
    return f"linear_{int(match[1]) // 2 + 1}.{match[2]}"


def sequence_name(name: str) -> str:
    """Return the name of a projector's tensor in a sequence of layers: the inverse of `projector_name`."""
    layer, _, kind = name.removeprefix("linear_").partition(".")
    return f"{2 * (int(layer) - 1)}.{kind}"
