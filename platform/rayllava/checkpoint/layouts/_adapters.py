"""Low-rank adapters of peft -> what is to be added to the weights beneath them: alpha / r * B A.

Computed in float32 when it is read; an adapter of a kind whose merge is another formula is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayllava import durable
from rayllava.checkpoint.layouts import Adapter, Found, Part
from rayllava.checkpoint.shards import write_weights
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


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def adapters(held: Mapping[str, Held], scale: Scale, *, said: str) -> Iterator[tuple[str, str, Adapter]]:
    """Yield (weight that is added to, name in the file, adapter) of every adapter.

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
        yield f"{name}.weight", pair["A"][0], Adapter(pair["A"][1], pair["B"][1], scale.alpha, scale.rslora)


def product(adapter: Adapter) -> Held:
    """Return what an adapter adds, computed in float32."""
    import torch

    down, up = adapter.down, adapter.up

    def make() -> Tensor:
        return adapter.scale * (up.read().float() @ down.read().float())

    return Computed((up.shape[0], down.shape[1]), torch.float32, make, trail_of(down))


def read_adapter(folder: Path) -> tuple[list[Path], list[tuple[str, str, Adapter]]]:
    """Return the files of an adapter's folder, and its `adapters`."""
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
    return [folder / "adapter_config.json", path], list(adapters(open_weights(path), scale, said=str(path)))


def adapters_on(found: Found, part: Part) -> dict[str, Adapter]:
    """Return the adapters on a part, by the module that they belong to."""
    return {
        weight.name.removesuffix(".weight"): weight.adapter
        for weight in found.weights
        if weight.part == part and weight.adapter
    }


def write_adapter(folder: Path, found: Mapping[str, Adapter], *, task: str | None) -> str:
    """Make a folder that peft reads, of adapters by the module they belong to; return the digest of its weights."""
    kinds = {(one.rank, one.alpha, one.rslora) for one in found.values()}
    if len(kinds) != 1:
        raise ValueError(f"adapters of {len(kinds)} ranks or scales have no place in one folder; merge them")
    [(rank, alpha, rslora)] = kinds
    weights: dict[str, Held] = {}
    for module, one in found.items():
        weights |= {
            f"base_model.model.{module}.lora_{x}.weight": held for x, held in (("A", one.down), ("B", one.up))
        }
    folder.mkdir(exist_ok=True)
    digests = write_weights(folder, weights, stem="adapter_model", whole=True)  # peft reads no shards
    config = _PLAIN | {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "target_modules": sorted({module.rpartition(".")[2] for module in found}),
        "task_type": task,
        "inference_mode": True,
    }
    durable.write_json(folder / "adapter_config.json", config)
    return digests["adapter_model.safetensors"]
