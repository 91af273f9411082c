"""Tensors by name -> the safetensors files of a folder, one tensor in memory at a time.

    model.safetensors                                                            where one file is enough
    model-00001-of-00002.safetensors ...   model.safetensors.index.json

The library's own writer wants all tensors of a file at once; the format is a length, a header and the bytes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayllava import durable
from rayllava.checkpoint.weights import Held, word_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_SHARD_BYTES = 4_000_000_000


def write_weights(
    folder: Path, weights: Mapping[str, Held], *, stem: str = "model", whole: bool = False
) -> dict[str, str]:
    """Write tensors into `folder` under their names and return the digest of every file by its name.

    No file but that of a single giant exceeds MAX_SHARD_BYTES, unless all is to lie in a `whole` one. The same
    tensors give the same bytes.
    """
    shards = list(_shards(weights, sys.maxsize if whole else MAX_SHARD_BYTES))
    if len(shards) == 1:
        return {f"{stem}.safetensors": _write(folder / f"{stem}.safetensors", shards[0])}
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        digests[name] = _write(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    size = sum(num_bytes(held) for held in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    durable.write_json(folder / f"{stem}.safetensors.index.json", index)
    return digests


def num_bytes(held: Held) -> int:
    """Return how many bytes a tensor takes, without reading it."""
    return math.prod(held.shape) * held.dtype.itemsize


def raw(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes in the order of its elements."""
    import torch

    flat: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat).cast("B")


def _shards(weights: Mapping[str, Held], max_bytes: int) -> Iterator[dict[str, Held]]:
    shard: dict[str, Held] = {}
    filled = 0
    for name, held in weights.items():
        size = num_bytes(held)
        if shard and filled + size > max_bytes:
            yield shard
            shard, filled = {}, 0
        shard[name] = held
        filled += size
    yield shard


def _write(path: Path, shard: Mapping[str, Held]) -> str:
    """Write one file and return its digest, which `durable.digest` gives too."""
    # Wide elements first, so that every tensor begins at a multiple of its element's width.
    names = sorted(shard, key=lambda name: (-shard[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        held = shard[name]
        begin, end = end, end + num_bytes(held)
        header[name] = {
            "dtype": word_of(held.dtype),
            "shape": list(held.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.blake2b(digest_size=32)
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            file.write(piece)
            digest.update(piece)
        for name in names:
            held = shard[name]
            content = raw(_read(name, held))
            file.write(content)
            digest.update(content)
    return digest.hexdigest()


def _read(name: str, held: Held) -> Tensor:
    tensor = held.read()
    got: tuple[tuple[int, ...], torch.dtype] = (tuple(tensor.shape), tensor.dtype)
    assert got == (held.shape, held.dtype), f"{name} is {got}, it was to be {held.shape} {held.dtype}"
    return tensor
