"""Which records become samples, and why the others do not."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from rayllava.data.ingest import ShardSpec, check, load, settle
from rayllava.data.sources import Record
from rayllava.place import Place
from rayllava.records import Turn
from rayllava.spec import override

WORDS = {"u": "user", "a": "assistant", "s": "system"}


def record(*turns: str, images: tuple[str, ...] = ()) -> Record:
    """`u:text` is a user turn, `a:text` an answer, `s:text` a system turn."""
    made = [Turn(WORDS[turn[0]], turn[2:]) for turn in turns]  # type: ignore[arg-type]
    return Record(line=1, id="x", turns=tuple(made), images=images)


def texts(one: Record) -> str:
    return " ".join(f"{turn.role[0]}:{turn.text}" for turn in one.turns)


def png(color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), color).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("turns", "settled", "mended"),
    [
        ("u:1 a:2 u:3 a:4", "u:1 a:2 u:3 a:4", []),
        ("s:0 u:1 a:2", "s:0 u:1 a:2", []),
        ("a:0 a:0 u:1 a:2", "u:1 a:2", ["answer before the first question dropped"] * 2),
        ("s:0 a:0 u:1 a:2", "s:0 u:1 a:2", ["answer before the first question dropped"]),
        ("u:1 a:2 u:3", "u:1 a:2", ["question without an answer dropped"]),
        ("u:1 u:2 a:3", "u:1\n2 a:3", ["questions in a row joined"]),
    ],
)
def test_turns_settle_as_the_upstreams_take_them(turns: str, settled: str, mended: list[str]) -> None:
    one, done = settle(record(*turns.split()))
    assert (texts(one), done) == (settled, mended)
    assert check(one) == ""


@pytest.mark.parametrize(
    ("turns", "images", "reason"),
    [
        ([], (), "no answer to learn from"),
        (["u:1"], (), "no answer to learn from"),
        (["u:1", "a: "], (), "no answer to learn from"),
        (["u:1", "a:2", "a:3"], (), "turn 3 is a second assistant turn in a row"),
        (["s:0", "u:1", "a:2", "s:3", "u:4", "a:5"], (), "turn 4 is a second system turn"),
        (["u:1", "a:2"], ("a.jpg",), "0 <image> marks in its questions for 1 image"),
        (["u:<image>", "a:2"], (), "1 <image> mark in its questions for 0 images"),
        (["u:<image>", "a:2"], ("a.jpg", "b.jpg"), "1 <image> mark in its questions for 2 images"),
        (
            ["u:<image>", "a:2", "u:<image>", "a:4"],
            ("a.jpg",),
            "2 <image> marks in its questions for 1 image",
        ),
        (["u:<image>", "a:2"], ("/etc/a.jpg",), "image /etc/a.jpg lies outside the image folder"),
        (["u:<image>", "a:2"], ("b/../../a.jpg",), "lies outside the image folder"),
        (["u:\ud800", "a:2"], (), "half a surrogate pair"),
    ],
)
def test_a_rejected_record_says_why(turns: list[str], images: tuple[str, ...], reason: str) -> None:
    assert reason in check(settle(record(*turns, images=images))[0])


def test_one_picture_may_be_marked_several_times_in_a_turn() -> None:
    assert check(record("u:<image> and <image>", "a:2", images=("a.jpg",))) == ""


def test_a_mark_in_an_answer_is_text() -> None:
    assert check(record("u:1", "a:write <image> there")) == ""


def test_a_loaded_sample_holds_the_files_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.jpg").write_bytes(png("red"))
    (tmp_path / "b" / "c.png").write_bytes(png("blue"))
    sample = load(record("u:<image><image>", "a:2", images=("a.jpg", "b/c.png")), Place(str(tmp_path)))
    assert sample.images == (png("red"), png("blue"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "image x.jpg is missing"),
        (b"", "image x.jpg: "),
        (b"<html>not found</html>", "image x.jpg: not an image"),
        (png()[:-30], "image x.jpg: "),
    ],
)
def test_a_picture_that_cannot_be_decoded_is_a_reason(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        load(record("u:<image>", "a:2", images=("x.jpg",)), Place(str(tmp_path)))


@pytest.mark.parametrize("name", ["", "a" * 300 + ".jpg", "\0.jpg"])
def test_a_path_that_names_no_file_is_a_reason(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"is missing|cannot be read"):
        load(record("u:<image>", "a:2", images=(name,)), Place(str(tmp_path)))


def test_the_budget_is_a_share_but_small_sets_may_lose_ten() -> None:
    assert ShardSpec(policy="fail", budget=0.5).allowed(1000) == 0
    assert ShardSpec(policy="skip").allowed(50) == 10
    assert ShardSpec(policy="skip").allowed(50_000) == 500
    assert ShardSpec(policy="skip", budget=0.1).allowed(50) == 5


def test_a_wrong_word_is_named_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"unknown field imges; did you mean images\? there are: images, pol"):
        override(ShardSpec(), ["imges=x"])
    with pytest.raises(ValueError, match="rows=0: input should be greater than or equal to 1"):
        override(ShardSpec(), ["rows=0"])
    with pytest.raises(ValueError, match="policy=ignore: input should be 'fail' or 'skip'"):
        override(ShardSpec(), ["policy=ignore"])
