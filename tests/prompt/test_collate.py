"""Examples side by side, and a batch's way through Arrow."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from rayllava.prompt.collate import collate, dummy, from_row, to_row
from rayllava.records import IGNORE, Batch
from tests.prompt.dialogues import sample
from tests.prompt.vocabularies import processor


@pytest.fixture
def batch() -> Batch:
    made = processor("pieces", "vicuna")
    samples = [
        sample("h:<image>\nQ1", "g:A1", images=1),
        sample("h:What is this?", "g:a cat sat on the mat", "h:Q2", "g:A2"),
        sample("h:<image> and <image>", "g:two dogs", images=2),
    ]
    return collate([made.encode(s) for s in samples], pad_token_id=made.spec.pad_token_id)


def test_examples_are_padded_on_the_right_without_labels(batch: Batch) -> None:  # G19
    pad = processor("pieces", "vicuna").spec.pad_token_id
    assert batch.ids.shape == batch.labels.shape == (3, batch.lengths.max())
    for ids, labels, length in zip(batch.ids, batch.labels, batch.lengths, strict=True):
        assert ids[0] == 1 and pad not in ids[:length]
        assert (ids[length:] == pad).all() and (labels[length:] == IGNORE).all()
    assert batch.pixels.shape == (3, 3, 28, 28) and batch.sample_ids == ("a", "a", "a")


def test_a_dummy_weighs_nothing() -> None:
    made = dummy(processor("pieces", "vicuna").spec)
    assert made.num_targets == 0 and made.sample_ids == () and len(made.pixels) == 0
    assert made.ids.shape == (1, 2) and made.lengths.tolist() == [2]


def same(one: Batch, other: Batch) -> bool:
    arrays = ("ids", "labels", "lengths", "pixels")
    return one.sample_ids == other.sample_ids and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        and getattr(one, name).dtype == getattr(other, name).dtype
        for name in arrays
    )


def test_a_row_crosses_arrow_unchanged(batch: Batch) -> None:
    rows = [
        to_row(batch, step=3, rejected=[]),
        to_row(dummy(processor("pieces", "vicuna").spec), step=4, rejected=["x"]),
    ]
    table = pa.Table.from_pylist(rows)
    back = table.to_pylist()
    assert [row["step"] for row in back] == [3, 4]
    assert same(from_row(back[0]), batch)
    assert from_row(back[1]).sample_ids == () and from_row(back[1]).pixels.shape == (0, 3, 28, 28)
    scalars = {name: table[name][0] for name in table.column_names}
    assert same(from_row(scalars), batch)


def test_bytes_are_not_copied(batch: Batch) -> None:
    row = to_row(batch)
    assert np.shares_memory(from_row(row).pixels, np.frombuffer(row["pixels"], dtype=np.uint8))
    buffer = pa.py_buffer(row["pixels"])
    assert np.shares_memory(from_row({**row, "pixels": buffer}).pixels, np.frombuffer(buffer, dtype=np.uint8))
