"""Tensors -> a safetensors file whose digest is made while it is written.

The library's own writers give no digest and would have every file read back from disk; the format is short:
8 bytes length of the header (little endian), the header in JSON padded by spaces to 8 bytes, the tensors' bytes
end to end (https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from rayllava.place import Place

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8"}
_PIECE = 1 << 20
"""Bytes that are digested and then copied while they lie in the CPU's cache."""


def write_state(place: Place, tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """Write CPU tensors to a new file; return its digest (rayllava.durable.digest) and its bytes."""
    found = hashlib.blake2b(digest_size=32)
    size = 0
    # The widest types first, as the library does, so that every tensor lies at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    with place.new_file() as file:
        for content in (_header(tensors, order), *(_bytes(tensors[name]) for name in order)):
            for start in range(0, len(content), _PIECE):
                piece = content[start : start + _PIECE]
                found.update(piece)
                file.write(piece)
            size += len(content)
    return found.hexdigest(), size


def _header(tensors: Mapping[str, Tensor], order: list[str]) -> memoryview:
    entries = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _bytes(tensor: Tensor) -> memoryview:
    assert tensor.is_contiguous(), "a copy that was not made contiguous"
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
