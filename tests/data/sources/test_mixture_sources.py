"""The files that list what a training set is mixed from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rayllava.data.sources import SOURCES, Portion
from rayllava.place import Place


def portions(source: str, path: Path, content: Any) -> list[Portion]:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    read = SOURCES[source].portions
    assert read
    return read(Place(str(path)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "a.jsonl").touch()
    (tmp_path / "meta" / "images").mkdir()
    return tmp_path


def entry(**fields: Any) -> dict[str, Any]:
    entry = {"root": "images/", "annotation": "a.jsonl", "data_augment": False, "repeat_time": 2, "length": 7}
    return {"set": entry | fields}


def test_a_meta_file_lists_its_sets(root: Path) -> None:
    folder = root / "meta"
    (one,) = portions("internvl", folder / "m.json", entry())
    assert one == Portion("set", "llava", f"{folder}/a.jsonl", f"{folder}/images", repeat=2.0, num_records=7)


def test_a_meta_file_may_leave_out_what_has_a_default(root: Path) -> None:
    (one,) = portions("internvl", root / "meta" / "m.json", {"set": {"annotation": "a.jsonl"}})
    assert (one.images, one.repeat, one.num_records) == ("", 1.0, None)


def test_a_fraction_is_kept_as_one(root: Path) -> None:
    assert portions("internvl", root / "meta" / "m.json", entry(repeat_time=0.5))[0].repeat == 0.5


def test_paths_may_start_from_the_current_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "playground" / "data").mkdir(parents=True)
    (root / "playground" / "a.jsonl").touch()
    monkeypatch.chdir(root)
    paths = entry(root="playground/data/", annotation="playground/a.jsonl")
    (one,) = portions("internvl", root / "meta" / "m.json", paths)
    assert (one.annotations, one.images) == (f"{root}/playground/a.jsonl", f"{root}/playground/data")


def test_absolute_paths_stay(root: Path) -> None:
    (one,) = portions("internvl", root / "meta" / "m.json", entry(root=str(root)))
    assert one.images == str(root)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_augment": True}, "set has data_augment=True; pictures are not augmented here, set it to false"),
        ({"repeat_time": 0}, "set has repeat_time=0; give a number above 0"),
        ({"repeat_time": "2"}, "set has repeat_time=2; give a number above 0"),
        ({"repeat_time": True}, "set has repeat_time=True; give a number above 0"),
        ({"length": 1.5}, "set has length=1.5; give its number of records"),
        ({"annotation": ""}, "set has annotation=; give the path"),
        ({"annotation": "no.jsonl"}, "annotation=no.jsonl, which is neither beside that file nor in the current"),
        ({"annotation": "/no/no.jsonl"}, "annotation=/no/no.jsonl, which is neither"),
        ({"root": "no"}, "root=no, which is neither beside that file nor in the current folder"),
        ({"root": 3}, "set has root=3; give the folder"),
        ({"max_dynamic_patch": 6}, "set has max_dynamic_patch, which means nothing here; there are: root, anno"),
    ],
)
def test_a_wrong_field_of_a_meta_file_is_named(root: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        portions("internvl", root / "meta" / "m.json", entry(**fields))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is no meta file"),
        ({}, "is no meta file"),
        ({"set": 3}, "set is no object; it needs root, annotation"),
        ('{"set": {}, "set": {}}', "'set' stands twice"),
        ('{"set": ', "malformed JSON at line 1 column 9"),
        ("<html>", "is a web page"),
    ],
)
def test_what_is_no_meta_file_is_told(root: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        portions("internvl", root / "meta" / "m.json", content)


def mix(**fields: Any) -> dict[str, Any]:
    return {"portions": [{"name": "one", "source": "llava", "annotations": "a.jsonl"} | fields]}


def test_a_mixture_lists_its_portions_beside_it(root: Path) -> None:
    folder = root / "meta"
    content = mix(images="images", repeat=0.5, most=3, num_records=9)
    content["portions"].append({"name": "two", "source": "parquet", "annotations": "/data", "images": "s3://b/i"})
    assert portions("mix", folder / "m.json", content) == [
        Portion("one", "llava", f"{folder}/a.jsonl", f"{folder}/images", repeat=0.5, most=3, num_records=9),
        Portion("two", "parquet", "/data", "s3://b/i"),
    ]


def test_paths_of_a_mixture_in_a_store_stay_in_the_store() -> None:
    from rayllava.data.sources._mixture import beside

    mixture = Place("s3://bucket/sets/m.json?scheme=http")
    assert beside(mixture, "a.jsonl").text == "s3://bucket/sets/a.jsonl?scheme=http"
    assert beside(mixture, "/data/a.jsonl").text == "/data/a.jsonl"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (mix(weight=2), "unknown field portions.0.weight; there are: name, source, annotations, images, repeat"),
        ({"portion": []}, "portions is missing; add it"),
        ({"portions": [], "seed": 1}, "portions=[]: list should have at least 1 item"),
        ({"portions": [{"name": "x"}]}, "portions.0.source is missing; add it"),
        (mix(repeat=0), "portions.0.repeat=0: input should be greater than 0"),
        (mix(most=0), "portions.0.most=0: input should be greater than or equal to 1"),
        (mix(name=""), "portions.0.name=: string should have at least 1 character"),
        (mix(source="lava"), "portion 'one' has source=lava; there are: internvl, inv_refcoco, llava, mix"),
        (mix(source="mix"), "portion 'one' has source=mix, a mixture itself; list its portions here"),
        (mix(source="internvl"), "portion 'one' has source=internvl, a mixture itself"),
        ({"portions": mix()["portions"] * 2}, "portion 'one' stands there twice; give each a name of its own"),
        ([1], "the file=[1]: input should be a valid dictionary"),
    ],
)
def test_a_wrong_field_of_a_mixture_is_named_in_one_line(root: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        portions("mix", root / "meta" / "m.json", content)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_mixture_in_the_documentation_reads(root: Path) -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text()
    (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    names = [portion.name for portion in portions("mix", root / "m.json", example)]
    assert names == ["refcoco", "inv_refcoco", "mix665k"]
