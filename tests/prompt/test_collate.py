"""Examples side by side, and a batch's way through Arrow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from rayllava.prompt.collate import collate, dummy, from_table, to_table
from rayllava.records import IGNORE, Batch, Example
from tests.prompt.dialogues import sample
from tests.prompt.vocabularies import processor


@pytest.fixture
def examples() -> list[Example]:
    made = processor("pieces", "vicuna")
    samples = [
        sample("h:<image>\nQ1", "g:A1", images=1),
        sample("h:What is this?", "g:a cat sat on the mat", "h:Q2", "g:A2"),
        sample("h:<image> and <image>", "g:two dogs", images=2),
    ]
    return [made.encode(s) for s in samples]


@pytest.fixture(params=[False, True], ids=["padded", "packed"])
def any_batch(request: pytest.FixtureRequest, examples: list[Example]) -> Batch:
    pad = processor("pieces", "vicuna").spec.pad_token_id
    return collate(examples, pad_token_id=pad, packed=request.param, index=5)


@pytest.fixture
def batch(examples: list[Example]) -> Batch:
    return collate(examples, pad_token_id=processor("pieces", "vicuna").spec.pad_token_id)


def test_examples_are_padded_on_the_right_without_labels(batch: Batch) -> None:  # G19
    pad = processor("pieces", "vicuna").spec.pad_token_id
    assert batch.ids.shape == batch.labels.shape == (3, batch.lengths.max())
    for ids, labels, length in zip(batch.ids, batch.labels, batch.lengths, strict=True):
        assert ids[0] == 1 and pad not in ids[:length]
        assert (ids[length:] == pad).all() and (labels[length:] == IGNORE).all()
    assert batch.pixels.shape == (3, 3, 28, 28) and batch.sample_ids == ("a", "a", "a")
    assert (batch.positions == np.arange(batch.ids.shape[1])).all()


def test_packed_examples_stand_end_to_end_and_count_from_zero_each(examples: list[Example], batch: Batch) -> None:
    packed = collate(examples, pad_token_id=-1, packed=True)
    length = sum(len(example.ids) for example in examples)
    assert packed.ids.shape == packed.labels.shape == packed.positions.shape == (1, length)
    assert packed.lengths.tolist() == [length] and packed.lengths.dtype == np.int32
    assert np.array_equal(packed.ids[0], np.concatenate([e.ids for e in examples]))
    assert np.array_equal(packed.labels[0], np.concatenate([e.labels for e in examples]))
    assert packed.positions[0].tolist() == [place for e in examples for place in range(len(e.ids))]
    assert np.array_equal(packed.pixels, batch.pixels) and packed.sample_ids == batch.sample_ids
    assert packed.num_targets == batch.num_targets


def test_a_packed_example_is_never_predicted_from_its_neighbour(examples: list[Example]) -> None:
    spoken = replace(examples[1], labels=examples[1].ids)
    assert collate([examples[0], spoken], pad_token_id=0).num_targets
    with pytest.raises(AssertionError, match="a would be predicted from its neighbour"):
        collate([examples[0], spoken], pad_token_id=0, packed=True)


def test_a_dummy_weighs_nothing() -> None:
    made = dummy(processor("pieces", "vicuna").spec)
    assert made.num_targets == 0 and made.sample_ids == () and len(made.pixels) == 0 and made.index == -1
    assert made.ids.shape == (1, 2) and made.lengths.tolist() == [2] and made.positions.tolist() == [[0, 1]]


def same(one: Batch, other: Batch) -> bool:
    arrays = ("ids", "labels", "positions", "lengths", "pixels")
    numbers = [(batch.sample_ids, batch.packed, batch.index) for batch in (one, other)]
    return numbers[0] == numbers[1] and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        and getattr(one, name).dtype == getattr(other, name).dtype
        for name in arrays
    )


def test_a_row_crosses_arrow_unchanged(any_batch: Batch) -> None:
    empty = dummy(processor("pieces", "vicuna").spec)
    sink = pa.BufferOutputStream()
    any_batch = replace(any_batch, index=5)
    tables = [to_table(any_batch, step=3), to_table(empty, rejected=[("a:1", "x")], step=4)]
    with pa.ipc.new_stream(sink, tables[0].schema) as stream:
        for table in tables:
            stream.write_table(table)
    back = pa.ipc.open_stream(sink.getvalue()).read_all()
    assert back["step"].to_pylist() == [3, 4] and back["rejected"].to_pylist() == [[], ["a:1"]]
    assert back["reasons"].to_pylist() == [[], ["x"]]
    assert same(from_table(back.slice(0, 1)), any_batch)
    none = from_table(back.slice(1, 1))
    assert none.sample_ids == () and none.pixels.shape == (0, 3, 28, 28) and none.index == -1 and not none.packed


def test_bytes_are_not_copied(any_batch: Batch) -> None:
    table = to_table(any_batch)
    assert np.shares_memory(from_table(table).pixels, any_batch.pixels)
