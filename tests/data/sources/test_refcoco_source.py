"""Boxes and the words that refer to them, asked in seven ways each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayllava.data.sources import SOURCES, Record
from rayllava.place import Place

ROW = {
    "id": "refcoco-unc-000000000001-left_dog",
    "image": "coco/train2017/000000000001.jpg",
    "sents": "left {dog}",
    "bbox": [29, 10.5, 40, 20],
    "height": 50,
    "width": 100,
}
BOX = "{<28><21><69><61>}"


def read(tmp_path: Path, source: str, **fields: Any) -> list[Record]:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([ROW, ROW | fields]))
    reader = SOURCES[source].read
    assert reader
    return list(reader(Place(str(path))))


def test_words_are_asked_for_their_box_in_seven_ways(tmp_path: Path) -> None:
    records = read(tmp_path, "refcoco")
    assert [one.turns[0].text for one in records[:7]] == [
        "[refer] left {dog}\n<image>",
        "[refer] give me the location of left {dog}\n<image>",
        "[refer] where is left {dog} ?\n<image>",
        "[refer] from this image, tell me the location of left {dog}\n<image>",
        "[refer] the location of left {dog} is\n<image>",
        "[refer] could you tell me the location for left {dog} ?\n<image>",
        "[refer] where can I locate the left {dog} ?\n<image>",
    ]
    assert {one.turns[1].text for one in records} == {BOX}


def test_boxes_are_asked_for_their_words_in_seven_ways(tmp_path: Path) -> None:
    records = read(tmp_path, "inv_refcoco")
    assert [one.turns[0].text for one in records[:7]] == [
        f"[identify] {BOX}\n<image>",
        f"[identify] what object is in this location {BOX}\n<image>",
        f"[identify] identify the object present at this location {BOX}\n<image>",
        f"[identify] what is it in {BOX}\n<image>",
        f"[identify] describe this object in {BOX}\n<image>",
        f"[identify] this {BOX} is\n<image>",
        f"[identify] the object in {BOX} is\n<image>",
    ]
    assert {one.turns[1].text for one in records} == {"left {dog}"}


def test_the_ways_share_a_line_and_number_their_ids(tmp_path: Path) -> None:
    records = read(tmp_path, "refcoco", id=7)
    assert [one.line for one in records] == [1] * 7 + [2] * 7
    assert [one.id for one in records[7:]] == [f"7-{n}" for n in range(7)]
    assert {one.images for one in records} == {("coco/train2017/000000000001.jpg",)}


def test_the_whole_picture_is_a_box_too(tmp_path: Path) -> None:
    records = read(tmp_path, "refcoco", bbox=[0, 0, 100, 50])
    assert records[-1].turns[1].text == "{<0><0><100><100>}"


@pytest.mark.parametrize("source", ["refcoco", "inv_refcoco"])
@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"bbox": None}, "bbox=None is not [x, y, width, height]"),
        ({"bbox": [1, 2, 3]}, "bbox=[1, 2, 3] is not [x, y, width, height]"),
        ({"bbox": [1, 2, "3", 4]}, "bbox='3'"),
        ({"bbox": [1, 2, float("nan"), 4]}, "bbox=nan"),
        ({"bbox": [1, 2, 0, 4]}, "bbox=[1, 2, 0, 4] has no place in a picture of 100 x 50 pixels"),
        ({"bbox": [-1, 2, 3, 4]}, "has no place in a picture"),
        ({"bbox": [101, 2, 3, 4]}, "has no place in a picture"),
        ({"width": 0}, "the picture is 0 x 50 pixels"),
        ({"height": None}, "height is missing, not a number"),
        ({"sents": ["a", "b"]}, "sents is a list, not text"),
    ],
)
def test_a_broken_row_is_one_record_with_its_fault(
    tmp_path: Path, source: str, fields: dict[str, Any], fault: str
) -> None:
    records = read(tmp_path, source, **fields)
    assert len(records) == 8
    assert fault in records[-1].fault and records[-1].line == 2


def test_a_wrong_image_is_the_fault_of_every_way(tmp_path: Path) -> None:
    assert [one.fault for one in read(tmp_path, "refcoco", image=3)[7:]] == ["image is a number, not a path"] * 7
