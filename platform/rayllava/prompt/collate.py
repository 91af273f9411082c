"""Examples -> Batch -> one Arrow row -> Batch.

A row holds plain bytes, numbers and strings: no tensor type that both ends would have to know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayllava.recipe import ProcessorSpec
from rayllava.records import IGNORE, Batch, Example


def collate(examples: Sequence[Example], *, pad_token_id: int, packed: bool = False, index: int = 0) -> Batch:
    """Return the examples side by side, padded on the right; packed, end to end in one row.

    The mask is `lengths`, never the pad id. `index` is the place of the atom in its step.
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
        packed=packed,
        index=index,
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
        packed=False,
        index=-1,
    )


def rehearsal(spec: ProcessorSpec, *, rows: int, positions: int, images: int) -> Batch:
    """Return a batch of this shape that is computed for nothing: every position that is no picture's is a target.

    Pictures stand at the front of the rows, no more of them than there is room for.
    """
    size, run = spec.image_size, spec.num_image_tokens
    positions = max(2, positions)
    ids = np.full((rows, positions), spec.eos_token_id, dtype=np.int32)
    room = (positions - 1) // run
    share = [min(room, images // rows + (row < images % rows)) for row in range(rows)]
    for row, count in zip(ids, share, strict=True):
        row[: count * run] = spec.image_token_id
    return Batch(
        ids=ids,
        labels=np.where(ids == spec.image_token_id, np.int32(IGNORE), ids),
        positions=np.tile(np.arange(positions, dtype=np.int32), (rows, 1)),
        lengths=np.full(rows, positions, dtype=np.int32),
        pixels=np.zeros((sum(share), 3, size, size), dtype=np.uint8),
        sample_ids=(),
        packed=False,
        index=-1,
    )


def to_table(batch: Batch, *, rejected: Sequence[tuple[str, str]] = (), **numbers: int) -> pa.Table:
    """Return the batch as a table of one row, its large arrays not copied, with `numbers` beside them.

    `rejected` are pairs of a sample's key and a reason; they become the columns `rejected` and `reasons`.
    """
    lists = {
        "shape": list(batch.ids.shape),
        "starts": np.flatnonzero(batch.positions == 0),
        "lengths": batch.lengths,
        "pixels_shape": list(batch.pixels.shape),
    }
    texts = {
        "sample_ids": list(batch.sample_ids),
        "rejected": [key for key, _ in rejected],
        "reasons": [reason for _, reason in rejected],
    }
    numbers |= {"packed": int(batch.packed), "index": batch.index}
    return pa.table(
        {name: _one_binary(getattr(batch, name)) for name in ("ids", "labels", "pixels")}
        | {name: pa.array([value], pa.list_(pa.int64())) for name, value in lists.items()}
        | {name: pa.array([value], pa.list_(pa.string())) for name, value in texts.items()}
        | {name: pa.array([value], pa.int64()) for name, value in numbers.items()}
    )


def _one_binary(array: np.ndarray) -> pa.Array:
    ends = pa.py_buffer(np.array([0, array.nbytes], dtype=np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(np.ascontiguousarray(array))])


def from_table(table: pa.Table) -> Batch:
    """Return the batch of a table of one row, its large arrays read-only views of the table's bytes."""
    shape = table["shape"][0].as_py()
    return Batch(
        ids=_array(table["ids"], np.int32, shape),
        labels=_array(table["labels"], np.int32, shape),
        positions=_positions(np.array(table["starts"][0].as_py()), shape),
        lengths=np.array(table["lengths"][0].as_py(), dtype=np.int32),
        pixels=_array(table["pixels"], np.uint8, table["pixels_shape"][0].as_py()),
        sample_ids=tuple(table["sample_ids"][0].as_py()),
        packed=bool(table["packed"][0].as_py()),
        index=table["index"][0].as_py(),
    )


def _positions(starts: NDArray[np.integer], shape: Sequence[int]) -> NDArray[np.int32]:
    """Return the count from the last start, row after row; each row has a start at its front."""
    size = math.prod(shape)
    counts = np.arange(size) - np.repeat(starts, np.diff(starts, append=size))
    return counts.astype(np.int32).reshape(shape)


def _array(column: pa.ChunkedArray, dtype: type, shape: Sequence[int]) -> np.ndarray:
    if math.prod(shape) == 0:  # frombuffer refuses an empty buffer
        return np.zeros(shape, dtype=dtype)
    (chunk,) = column.chunks
    _, ends, content = chunk.buffers()  # a scalar of the column would be a copy
    begin, end = np.frombuffer(ends, dtype=np.int64)[chunk.offset :][:2]
    return np.frombuffer(content, dtype=np.uint8)[begin:end].view(dtype).reshape(shape)
