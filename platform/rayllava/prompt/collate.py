"""Examples -> Batch -> one Arrow row -> Batch.

A row holds plain bytes, numbers and strings: no tensor type that both ends would have to know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayllava.recipe import ProcessorSpec
from rayllava.records import IGNORE, Batch, Example


def collate(examples: Sequence[Example], *, pad_token_id: int, packed: bool = False) -> Batch:
    """Return the examples side by side, padded on the right; packed, end to end in one row.

    The mask is `lengths`, never the pad id.
    """
    assert examples, "a batch needs an example; see `dummy`"
    lengths = np.array([len(example.ids) for example in examples], dtype=np.int32)
    shape = (1, int(lengths.sum())) if packed else (len(examples), int(lengths.max()))
    starts = np.cumsum(lengths) - lengths if packed else np.arange(shape[0]) * shape[1]
    ids = np.full(shape, pad_token_id, dtype=np.int32)
    labels = np.full(shape, IGNORE, dtype=np.int32)
    for example, start in zip(examples, starts, strict=True):
        assert len(example.labels) == len(example.ids), f"{example.id}: labels do not match ids"
        assert not packed or example.labels[0] == IGNORE, f"{example.id} would be predicted from its neighbour"
        ids.reshape(-1)[start : start + len(example.ids)] = example.ids
        labels.reshape(-1)[start : start + len(example.ids)] = example.labels
    return Batch(
        ids=ids,
        labels=labels,
        positions=_positions(starts, shape),
        lengths=lengths.sum(keepdims=True, dtype=np.int32) if packed else lengths,
        pixels=np.concatenate([example.pixels for example in examples]),
        sample_ids=tuple(example.id for example in examples),
    )


def dummy(spec: ProcessorSpec) -> Batch:
    """Return a batch that weighs nothing: no target, no picture, no sample."""
    size = spec.image_size
    return Batch(
        ids=np.full((1, 2), spec.pad_token_id, dtype=np.int32),
        labels=np.full((1, 2), IGNORE, dtype=np.int32),
        positions=np.array([[0, 1]], dtype=np.int32),
        lengths=np.array([2], dtype=np.int32),
        pixels=np.zeros((0, 3, size, size), dtype=np.uint8),
        sample_ids=(),
    )


def to_row(batch: Batch, **extra: Any) -> dict[str, Any]:
    """Return the batch as values that Arrow knows, with `extra` beside them."""
    row = {
        "ids": batch.ids.tobytes(),
        "labels": batch.labels.tobytes(),
        "shape": list(batch.ids.shape),
        "starts": np.flatnonzero(batch.positions == 0).tolist(),
        "lengths": batch.lengths.tolist(),
        "pixels": batch.pixels.tobytes(),
        "pixels_shape": list(batch.pixels.shape),
        "sample_ids": list(batch.sample_ids),
    }
    assert not row.keys() & extra.keys(), f"{row.keys() & extra.keys()} belong to the batch"
    return {**row, **extra}


def from_row(row: Mapping[str, Any]) -> Batch:
    """Return the batch of a row, its large arrays read-only views of the row's bytes.

    Values may be Python's own, Arrow buffers or Arrow scalars.
    """
    shape = _plain(row["shape"])
    return Batch(
        ids=_array(row["ids"], np.int32, shape),
        labels=_array(row["labels"], np.int32, shape),
        positions=_positions(np.array(_plain(row["starts"])), shape),
        lengths=np.array(_plain(row["lengths"]), dtype=np.int32),
        pixels=_array(row["pixels"], np.uint8, _plain(row["pixels_shape"])),
        sample_ids=tuple(_plain(row["sample_ids"])),
    )


def _positions(starts: NDArray[np.integer], shape: Sequence[int]) -> NDArray[np.int32]:
    """Return the count from the last start, row after row; each row has a start at its front."""
    size = math.prod(shape)
    counts = np.arange(size) - np.repeat(starts, np.diff(starts, append=size))
    return counts.astype(np.int32).reshape(shape)


def _array(value: Any, dtype: type, shape: Sequence[int]) -> np.ndarray:
    content = value.as_buffer() if hasattr(value, "as_buffer") else value
    if math.prod(shape) == 0:  # frombuffer refuses an empty buffer
        return np.zeros(shape, dtype=dtype)
    return np.frombuffer(content, dtype=dtype).reshape(shape)


def _plain(value: Any) -> Any:
    return value.as_py() if hasattr(value, "as_py") else value
