"""What LLaVA's conversation files look like in the wild."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayllava.data.sources import SOURCES, Record
from rayllava.data.sources._published import expected
from rayllava.place import Place
from rayllava.records import Turn

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
TURNS = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A dog."))


def read(path: Path) -> list[Record]:
    source = SOURCES["llava"].read
    assert source
    return list(source(Place(str(path))))


def record(tmp_path: Path, **fields: Any) -> Record:
    path = tmp_path / "one.json"
    path.write_text(json.dumps([{"id": "a", "conversations": TALK} | fields]))
    return read(path)[0]


def test_an_array_and_lines_read_alike(tmp_path: Path) -> None:
    rows = [{"id": f"{n}", "image": f"{n}.jpg", "conversations": TALK} for n in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [Record(line=n + 1, id=f"{n}", turns=TURNS, images=(f"{n}.jpg",)) for n in range(3)]
    assert read(tmp_path / "a.json") == read(tmp_path / "a.jsonl") == expected


def test_lines_count_empty_ones_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + '{"conversations": []}\n\n{"conversations": []}\n')
    assert [(one.line, one.id) for one in read(path)] == [(1, "1"), (3, "3")]


@pytest.mark.parametrize(
    ("image", "names"),
    [("a.jpg", ("a.jpg",)), (["a.jpg", "b/c.png"], ("a.jpg", "b/c.png")), (None, ()), ([], ())],
)
def test_image_may_be_a_path_a_list_or_null(tmp_path: Path, image: Any, names: tuple[str, ...]) -> None:
    assert record(tmp_path, image=image).images == names


def test_a_record_without_image_is_text(tmp_path: Path) -> None:
    assert record(tmp_path).images == ()


def test_images_may_stand_under_their_plural(tmp_path: Path) -> None:
    assert record(tmp_path, images=["a.jpg", "b.jpg"]).images == ("a.jpg", "b.jpg")
    assert record(tmp_path, image=None, images=["a.jpg"]).images == ("a.jpg",)


def test_ids_may_be_numbers_or_missing(tmp_path: Path) -> None:
    assert record(tmp_path, id=17).id == "17"
    assert record(tmp_path, id=None).id == "1"
    assert record(tmp_path, id=True).id == record(tmp_path, id=[1]).id == "1"


def test_extra_keys_do_not_matter(tmp_path: Path) -> None:
    assert record(tmp_path, model="", width=3, bbox=[[1, 2]], height=[4]) == record(tmp_path)


def test_speakers_may_be_called_user_assistant_and_system(tmp_path: Path) -> None:
    names = ["system", "user", "assistant"]
    talk = [{"from": name, "value": name.upper(), "weight": 1} for name in names]
    assert record(tmp_path, conversations=talk).turns == tuple(Turn(name, name.upper()) for name in names)


def test_messages_with_roles_read_like_conversations(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A dog."}]
    assert record(tmp_path, conversations=None, messages=talk).turns == TURNS


def test_parts_of_a_message_become_lines_with_marks(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Is"}, {"type": "image"}, {"type": "text", "text": "like"}, {"type": "image"}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}]
    expected_turns = (Turn("user", "Is\n<image>\nlike\n<image>"), Turn("assistant", "Yes"))
    assert record(tmp_path, conversations=None, messages=talk).turns == expected_turns


def test_rounds_of_texts_have_their_pictures_in_front(tmp_path: Path) -> None:
    rounds = [{"user": "What?", "assistant": "A dog.", "source": "x"}, {"user": "Sure?", "assistant": "Yes."}]
    one = record(tmp_path, conversations=None, texts=rounds, images=["a.jpg", "b.jpg"])
    assert [turn.text for turn in one.turns] == ["<image>\n<image>\nWhat?", "A dog.", "Sure?", "Yes."]


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"conversations": None}, "conversations is missing, not a list"),
        ({"conversations": ["hello"]}, "turn 1 is text, not an object"),
        ({"conversations": [{"from": "tool", "value": ""}]}, "turn 1 is from 'tool'; known are human, user"),
        ({"conversations": [{"from": "human", "value": 3}]}, "the value of turn 1 is a number, not text"),
        ({"messages": 3, "conversations": None}, "messages is a number, not a list"),
        ({"conversations": [{"from": "human", "value": ["hi"]}]}, "a part of turn 1 is text, not an object"),
        (
            {"conversations": [{"from": "human", "value": [{"type": "video"}]}]},
            "a part of turn 1 is of type 'video'; known are text, image",
        ),
        (
            {"conversations": [{"from": "human", "value": [{"type": "text"}]}]},
            "the text of a part of turn 1 is missing, not text",
        ),
        ({"conversations": None, "texts": ["hello"]}, "round 1 is text, not an object"),
        ({"conversations": None, "texts": [{"user": "What?"}]}, "assistant of round 1 is missing, not text"),
        ({"image": ""}, "image is an empty path"),
        ({"image": 3}, "image is a number, not a path"),
        ({"image": ["a.jpg", {"path": "b.jpg"}]}, "image is an object, not a path"),
    ],
)
def test_a_record_that_makes_no_sense_carries_its_fault(tmp_path: Path, fields: Any, fault: str) -> None:
    assert fault in record(tmp_path, **fields).fault


def test_what_is_no_object_carries_its_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('["hello", 3, null, {"conversations": []}]')
    faults = [one.fault for one in read(path)]
    assert faults == [f"the record is {kind}, not an object" for kind in ("text", "a number", "missing")] + [""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n<!DOCTYPE html><html>", "is a web page, not JSON; download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a git-lfs pointer.*git lfs pull"),
        (b"", "is empty"),
        (b"PK\x03\x04", "malformed JSON at line 1 column 1"),
        (b'[{"id": 1},\n {"id": 2', r"malformed JSON at line 2 column \d+: Expecting"),
        (b'{"id": 1}\n{"id": 2,}\n', r"malformed JSON at line 2 column \d+"),
        (b'[{"id": "\xff"}]', "is not UTF-8 text"),
        (b'{"id": "\xff"}', "is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_annotation_file_is_named_for_what_it_is(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent.json is not a file"):
        read(tmp_path / "absent.json")


def test_sharegpt4v_is_the_same_layout() -> None:
    assert SOURCES["sharegpt4v"] == SOURCES["llava"]


def test_published_files_are_known_by_name() -> None:
    assert expected("llava_v1_5_mix665k.json") == 665_298
    assert expected("geoqa+.jsonl") == 72_318
    assert expected("mine.json") is None
