"""A file that comes in pieces of any size reads as the whole."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rayllava.data.sources import _jsonrows
from rayllava.place import Place

SIZES = range(1, 18)


def rows(path: Path) -> list[tuple[int, Any]]:
    return list(_jsonrows.rows(Place(str(path))))


def values(random_: random.Random, depth: int = 0) -> Any:
    """Return something that JSON can say."""
    some = ["", "a", 'quote " and \\ and \n', "ünïcode 你好 🙂", "\t", "]", "},{", "x" * 40]
    numbers = [0, -1, 17, 1.5, -2.5e-7, 12345678901234567890, 1e300]
    if depth > 2 or random_.random() < 0.5:
        return random_.choice([*some, *numbers, True, False, None])
    if random_.random() < 0.5:
        return [values(random_, depth + 1) for _ in range(random_.randrange(4))]
    return {random_.choice(some): values(random_, depth + 1) for _ in range(random_.randrange(4))}


@pytest.mark.parametrize("size", SIZES)
def test_an_array_in_pieces_is_the_array(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_jsonrows, "CHUNK", size)
    path = tmp_path / "a.json"
    for seed in range(40):
        random_ = random.Random(seed)
        made = [values(random_) for _ in range(random_.randrange(12))]
        text = json.dumps(made, indent=random_.choice([None, 0, 3]), ensure_ascii=random_.random() < 0.5)
        blanks = random_.choice(["", "\ufeff", " \r\n\t", "\ufeff\n"])
        path.write_bytes((blanks + text + random_.choice(["", "\n", " \r\n "])).encode())
        assert rows(path) == list(enumerate(json.loads(text), start=1))


@pytest.mark.parametrize("size", SIZES)
def test_lines_in_pieces_are_the_lines(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_jsonrows, "CHUNK", size)
    path = tmp_path / "a.jsonl"
    for seed in range(40):
        random_ = random.Random(seed)
        expected, text, line = [], "", 1
        for _ in range(1 + random_.randrange(8)):
            made = {"x": values(random_)}
            expected.append((line, made))
            gap = random_.choice(["\n", "\r\n", "\n\n \n"])
            text += json.dumps(made, ensure_ascii=False) + gap
            line += gap.count("\n")
        path.write_text(text, newline="")
        assert rows(path) == expected


@pytest.mark.parametrize("text", ["[12, 345, -6.5e+10, 0.25]", "[1E5]", "[-0, -Infinity, true, null]", "[]", "[ ]"])
@pytest.mark.parametrize("size", SIZES)
def test_a_number_at_the_border_stays_whole(
    tmp_path: Path, text: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_jsonrows, "CHUNK", size)
    path = tmp_path / "a.json"
    for shift in range(12):
        path.write_text(text[0] + " " * shift + text[1:])
        assert [value for _, value in rows(path)] == json.loads(text)


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ('[{"a": 1}', "line 1 column 10: Expecting ',' delimiter"),
        ('[{"a": 1},', "line 1 column 11: Expecting value"),
        ('[{"a": 1},]', "line 1 column 11: Expecting value"),
        ('[{"a": 1} {"a": 2}]', "line 1 column 11: Expecting ',' delimiter"),
        ('[{"a": 1}]\n[', "line 2 column 1: Extra data"),
        ('[{"a": 1}] and more', "line 1 column 12: Extra data"),
        ('[{"a": 1},\n\n {"a": }]', "line 3 column 8: Expecting value"),
        ('[{"a": 1},\n {"äöü": "b\n"}]', "line 2 column 12: Invalid control character at"),
        ('[{"a": 1},\n {"a": "b', "line 2 column 8: Unterminated string starting at"),
        ('{"a": 1}\n{"a": tru}\n', "line 2 column 7: Expecting value"),
        ('{"a": 1}\n{"a": 2} {"a": 3}\n', "line 2 column 10: Extra data"),
        ('{"a": 1},\n{"a": 2}\n', "line 1 column 9: Extra data"),
        ("[" + "[" * 100_000, "line 1 column 2: maximum recursion depth exceeded"),
        ("[" + "1" * 5000 + "]", "line 1 column 2: Exceeds the limit"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
def test_what_is_malformed_is_named_by_line_and_column(
    tmp_path: Path, content: str, where: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_jsonrows, "CHUNK", size)
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is malformed JSON at") as raised:
        rows(path)
    assert where in str(raised.value)


@pytest.mark.parametrize("size", SIZES)
def test_bytes_that_are_no_text_are_told_at_any_border(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_jsonrows, "CHUNK", size)
    path = tmp_path / "a.json"
    for content in (b'["\xc3"]', b'["\xe4\xbd', b'["\xf0\x9f\x99"]', b'{"a": "\xff"}'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not UTF-8 text"):
            rows(path)


def test_one_object_over_many_lines_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": [1, 2]}, indent=2) + "\n" + json.dumps({"b": 3}))
    assert rows(path) == [(1, {"a": [1, 2]}), (7, {"b": 3})]


def test_a_record_longer_than_the_bound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_jsonrows, "CHUNK", 64)
    monkeypatch.setattr(_jsonrows, "LONGEST", 1000)
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n "' + "x" * 5000 + '"]')
    with pytest.raises(ValueError, match="at line 2 column 2: the record is longer than 0 MiB"):
        rows(path)


def test_what_came_before_the_fault_is_yielded(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1, 2, 3")
    found = []
    with pytest.raises(ValueError, match="malformed JSON"):
        for _, value in _jsonrows.rows(Place(str(path))):
            found.append(value)
    assert found == [1, 2, 3]


def test_a_file_is_not_held_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "a.json"
    row = json.dumps({"id": 1, "conversations": [{"from": "gpt", "value": "word " * 200}]})
    path.write_text("[" + ",\n".join([row] * 20_000) + "]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in _jsonrows.rows(Place(str(path)))) == 20_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 20 << 20
    assert peak < 8 << 20
