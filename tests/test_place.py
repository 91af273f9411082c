"""Places behave alike on a disk and in an object store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rayllava import durable
from rayllava.place import Place
from tests.data.store import bucket


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with bucket("places") as address:
        yield address


@pytest.fixture(params=["disk", "store"])
def folder(request: pytest.FixtureRequest, store: str, tmp_path: Path) -> Place:
    return Place(str(tmp_path / "a")) if request.param == "disk" else Place(store.format(tmp_path.name))


def test_what_is_written_is_read(folder: Place) -> None:
    place = folder / "b/c.txt"
    assert not place.exists() and not folder.is_dir()
    place.write_bytes(b"hello")
    assert (place.is_file(), place.is_dir(), folder.is_dir()) == (True, False, True)
    assert (place.read_bytes(), place.size(), place.name) == (b"hello", 5, "c.txt")
    with place.open() as file:
        file.seek(2)
        assert file.read() == b"llo"
    place.write_bytes(b"")
    assert place.size() == 0


def test_files_are_listed_in_order_and_by_their_ends(folder: Place) -> None:
    for name in ("b/2.tar", "b/1.TAR", "a.json", ".hidden/x.tar"):
        (folder / name).write_bytes(b"x")
    assert [str(f).removeprefix(str(folder)) for f in folder.files()] == ["/a.json", "/b/1.TAR", "/b/2.tar"]
    assert [f.name for f in folder.files((".tar",))] == ["1.TAR", "2.tar"]


def test_a_finished_file_moves_in_whole(folder: Place, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.write_bytes(b"x" * 9_000_000)
    (folder / "x").take(made)
    assert not made.exists() and (folder / "x").size() == 9_000_000
    (folder / "x").move(folder / "y")
    assert [place.name for place in folder.files()] == ["y"]
    with pytest.raises(FileNotFoundError):
        (folder / "x").move(folder / "z")


def test_a_streamed_file_is_whole_or_absent(folder: Place) -> None:
    with (folder / "b/x").new_file() as file:
        file.write(b"hel")
        assert not (folder / "b/x").exists()
        file.write(memoryview(b"lo"))
    assert (folder / "b/x").read_bytes() == b"hello"
    assert (folder / "b/x").digest() == durable.digest_bytes(b"hello")
    with pytest.raises(RuntimeError), (folder / "b/y").new_file() as file:
        file.write(b"half")
        raise RuntimeError
    assert [place.name for place in folder.files()] == ["x"]


def test_a_folder_moves_in_whole_and_replaces_what_was_there(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    take = Place.take

    def slow(place: Place, path: Path) -> None:
        seen.append(sorted(made.stamps()))
        take(place, path)

    monkeypatch.setattr(Place, "take", slow)  # what a reader of the store finds between two files
    made = folder / "made"
    for names in (("a", "manifest.json", "b/z"), ("manifest.json", "c")):
        with folder.scratch() as scratch:
            for name in names:
                (Place(str(scratch / "made")) / name).write_bytes(str(names).encode())
            made.take_dir(scratch / "made", last="manifest.json")
        assert sorted(made.stamps()) == sorted(names)
        assert (made / "manifest.json").read_bytes() == str(names).encode()
    assert not any("manifest.json" in names for names in seen), "a folder that is being replaced must not count"
    assert len(seen) == (5 if folder.remote else 0)


def test_stamps_tell_a_changed_file(folder: Place) -> None:
    for name in ("a", "b/c", ".hidden"):
        (folder / name).write_bytes(b"x")
    before = folder.stamps()
    assert list(before) == ["a", "b/c"] and {size for size, _ in before.values()} == {1}
    (folder / "a").write_bytes(b"xy")
    assert folder.stamps()["a"] != before["a"] and folder.stamps()["b/c"] == before["b/c"]


def test_removing_leaves_nothing_and_may_be_done_twice(folder: Place) -> None:
    (folder / "b/c").write_bytes(b"x")
    for _ in range(2):
        (folder / "b").remove()
        assert folder.files() == []


def test_a_missing_file_is_an_error_of_its_name(folder: Place) -> None:
    for read in (Place.read_bytes, Place.size):
        with pytest.raises(FileNotFoundError):
            read(folder / "absent")


def test_scratch_is_gone_afterwards(folder: Place) -> None:
    with folder.scratch() as path:
        (path / "x").write_bytes(b"x")
    assert not path.exists() and folder.files() == []


def test_a_folder_that_cannot_be_written_says_so(store: str) -> None:
    with pytest.raises(ValueError, match="out=s3://nobody/x cannot be written"):
        Place(store.format("x").replace("places", "nobody")).check_writable()


def test_a_strange_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="known are paths, s3:// and gs://"):
        Place("ftp://host/x").read_bytes()


def test_options_stay_with_what_is_below() -> None:
    place = Place("s3://me:secret@bucket/a?scheme=http") / "b"
    assert place.text == "s3://me:secret@bucket/a/b?scheme=http"
    assert (str(place), place.name) == ("s3://bucket/a/b", "b")


def test_a_name_cannot_bring_options_of_its_own() -> None:
    with pytest.raises(ValueError, match="is no name in a store"):
        Place("s3://bucket/images") / "a.jpg?endpoint_override=evil.example&scheme=http"
    assert (Place("/images") / "a?b.jpg").local == Path("/images/a?b.jpg")


def test_a_file_that_goes_while_its_folder_is_listed_is_not_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("goes", "stays"):
        (tmp_path / name).touch()
    look = Path.is_file

    def late(path: Path) -> bool:
        found = look(path)
        (tmp_path / "goes").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "is_file", late)
    assert [place.name for place in Place(str(tmp_path)).files()] == ["stays"]
