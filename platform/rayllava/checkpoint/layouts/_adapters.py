"""Low-rank adapters of peft -> what is to be added to the weights beneath them: alpha / r * B A.

Computed in float32 when it is read; an adapter of a kind whose merge is another formula is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayllava.checkpoint.weights import Computed, Held, open_weights, read_config, trail_of

if TYPE_CHECKING:
    from torch import Tensor

_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")

_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "alpha_pattern": {},
    "rank_pattern": {},
}
"""What adapter_config.json says of an adapter whose merge is the formula above."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of an adapter counts."""

    alpha: float
    rslora: bool = False

    def at(self, rank: int) -> float:
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def products(held: Mapping[str, Held], scale: Scale, *, said: str) -> Iterator[tuple[str, str, Held]]:
    """Yield (weight that is added to, name in the file, product) of every adapter.

    Raises ValueError, beginning with `said`, for one that is not a whole pair of matrices.
    """
    pairs: dict[str, dict[str, tuple[str, Held]]] = {}
    for name, tensor in held.items():
        match = _NAME.fullmatch(name)
        if match is None or len(tensor.shape) != 2:
            raise ValueError(f"{said} holds {name[:120]!a}, which is no adapter of a linear layer")
        pairs.setdefault(match[1], {})[match[2]] = (name, tensor)
    for name, pair in pairs.items():
        if pair.keys() != {"A", "B"} or not pair["A"][1].shape[0] == pair["B"][1].shape[1] > 0:
            raise ValueError(f"{said} holds one half of the adapter on {name[:120]!a}, or two that do not fit")
        yield f"{name}.weight", pair["A"][0], _product(pair["A"][1], pair["B"][1], scale)


def _product(down: Held, up: Held, scale: Scale) -> Held:
    import torch

    def make() -> Tensor:
        return scale.at(down.shape[0]) * (up.read().float() @ down.read().float())

    return Computed((up.shape[0], down.shape[1]), torch.float32, make, trail_of(down))


def read_adapter(folder: Path) -> tuple[list[Path], list[tuple[str, str, Held]]]:
    """Return the files of an adapter's folder, and its `products`."""
    config = read_config(folder, "adapter_config.json")
    for key, plain in _PLAIN.items():
        if config.get(key, plain) not in (plain, None):
            raise ValueError(
                f"{folder} has {key}={config[key]!r} in its adapter_config.json; merge it with peft first"
            )
    names = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()]
    if not names or not isinstance(config.get("lora_alpha"), int | float):
        raise ValueError(f"{folder} lacks adapter_model.safetensors, or lora_alpha in its adapter_config.json")
    scale = Scale(float(config["lora_alpha"]), bool(config.get("use_rslora")))
    path = folder / names[0]
    return [folder / "adapter_config.json", path], list(products(open_weights(path), scale, said=str(path)))
