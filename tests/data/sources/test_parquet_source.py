"""Tables as data sets on the Hugging Face hub have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayllava.data.sources import SOURCES, Record, parquet
from rayllava.place import Place
from rayllava.records import Turn

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
TURNS = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A dog."))


def read(path: Path) -> list[Record]:
    source = SOURCES["parquet"].read
    assert source
    return list(source(Place(str(path))))


def records(tmp_path: Path, *rows: dict[str, Any], schema: pa.Schema | None = None) -> list[Record]:
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), tmp_path / "a.parquet")
    return read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("image", "images"),
    [
        ({"image": {"bytes": b"0", "path": "0.jpg"}}, (b"0",)),
        ({"image": {"bytes": None, "path": "x/0.jpg"}}, ("x/0.jpg",)),
        ({"image": b"0"}, (b"0",)),
        ({"image": "x/0.jpg"}, ("x/0.jpg",)),
        ({"image": None}, ()),
        ({}, ()),
        ({"images": [{"bytes": b"0", "path": None}, {"bytes": b"1", "path": None}]}, (b"0", b"1")),
        ({"images": [b"0", b"1"]}, (b"0", b"1")),
        ({"images": []}, ()),
    ],
)
def test_pictures_stand_in_the_row_or_are_named(tmp_path: Path, image: Any, images: tuple[Any, ...]) -> None:
    (one,) = records(tmp_path, {"id": 7, "conversations": TALK} | image)
    assert one == Record(line=1, id="7", turns=TURNS, images=images)


def test_messages_may_be_made_of_parts(tmp_path: Path) -> None:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    talk = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
    ]
    (one,) = records(tmp_path, {"images": [b"0"], "messages": talk})
    assert (one.turns, one.id) == (TURNS, "1")


def test_rounds_of_texts_have_their_pictures_in_front(tmp_path: Path) -> None:
    (one,) = records(tmp_path, {"images": [{"bytes": b"0"}], "texts": [{"user": "What?", "assistant": "A dog."}]})
    assert one.turns == TURNS


@pytest.mark.parametrize("column", ["caption", "text"])
def test_a_picture_and_its_caption_are_one_round(tmp_path: Path, column: str) -> None:
    (one,) = records(tmp_path, {"image": b"0", column: "A dog."})
    assert one.turns == (Turn("user", "<image>"), Turn("assistant", "A dog."))


def test_rows_are_counted_over_row_groups(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"image": str(n), "caption": f"{n}", "width": n} for n in range(50)])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    assert [(one.line, one.turns[1].text) for one in read(tmp_path / "a.parquet")] == [
        (n + 1, str(n)) for n in range(50)
    ]


def test_a_large_row_group_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROWS", 2)
    import os

    rows = [{"image": os.urandom(1 << 18), "caption": "A."} for _ in range(256)]
    # A page is what must be held; pages of a few rows make the row group the larger of the two.
    pages = {"use_dictionary": False, "write_batch_size": 4, "data_page_size": 1 << 20}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=256, **pages)
    del rows
    before, peak = pa.total_allocated_bytes(), 0
    source = SOURCES["parquet"].read
    assert source
    for _ in source(Place(str(tmp_path / "a.parquet"))):
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 16 << 20


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"image": {"bytes": None, "path": None}, "conversations": TALK}, "image 1 is no picture and no path"),
        ({"images": [b"0", b""], "conversations": TALK}, "image 2 is no picture and no path"),
        ({"images": ["a", ""], "conversations": TALK}, "image 2 is no picture and no path"),
        (
            {"images": [{"bytes": b"0", "path": "0"}, {"bytes": None, "path": "1"}], "conversations": TALK},
            "some of its images are pictures, some are paths",
        ),
        ({"image": 3, "conversations": TALK}, "image 1 is no picture and no path"),
        ({"image": None, "caption": "A"}, "it has a caption but no picture"),
        ({"image": b"0", "caption": None}, "the caption is missing, not text"),
        ({"image": b"0", "conversations": None}, "conversations is missing, not a list"),
        ({"image": b"0", "conversations": [{"from": "tool", "value": "x"}]}, "turn 1 is from 'tool'"),
    ],
)
def test_a_row_that_makes_no_sense_carries_its_fault(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    assert fault in records(tmp_path, row)[0].fault


def test_a_table_of_something_else_is_told_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="has columns a, image; expected are conversations, messages, texts, or image"
    ):
        records(tmp_path, {"a": 1, "image": b"0"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<html>", "is a web page, not parquet"),
        (b"PK\x03\x04", "is no parquet file"),
        (b"PAR1" + b"x" * 100, "is a broken parquet file"),
        (b"PAR1", "is a broken parquet file"),
    ],
)
def test_what_is_no_parquet_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.parquet")


def test_a_file_broken_in_the_middle_is_told(tmp_path: Path) -> None:
    records(tmp_path, *({"image": bytes([n]) * 1000, "caption": f"{n}" * 100} for n in range(100)))
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:400] = b"\xff" * 396
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="is a broken parquet file"):
        read(tmp_path / "a.parquet")
