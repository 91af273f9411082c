"""Folders of a store on a node: copied once, whole or absent, and known by what they hold."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayllava import copies, durable
from rayllava.place import Place
from tests.data.store import bucket

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with bucket("copies") as address:
        yield address


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_on_a_disk_is_itself(tmp_path: Path) -> None:
    assert copies.local(Place(str(tmp_path))) == tmp_path


def test_a_stores_folder_is_copied_when_it_changed(address: str, tmp_path: Path) -> None:
    folder = Place(address.format("changing"))
    with pytest.raises(FileNotFoundError, match="s3://copies/changing holds no file"):
        copies.local(folder)
    for name, content in (("a.txt", b"old"), ("b/c.bin", bytes(9_000_000))):
        (folder / name).write_bytes(content)
    first = copies.local(folder)
    assert first.is_relative_to(tmp_path)
    assert {name: (first / name).stat().st_size for name in ("a.txt", "b/c.bin")} == {
        "a.txt": 3,
        "b/c.bin": 9_000_000,
    }
    inode = (first / "a.txt").stat().st_ino
    assert copies.local(folder) == first and (first / "a.txt").stat().st_ino == inode
    (folder / "a.txt").write_bytes(b"newer")
    second = copies.local(folder)
    assert (second / "a.txt").read_bytes() == b"newer"
    assert not first.exists(), "a copy that is out of date stays for ever"


def test_a_copy_that_fails_leaves_nothing_and_is_made_anew(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise OSError("the store went away")

    with pytest.raises(OSError, match="went away"):
        copies.copy_of("s3://bucket/a", "1", fail)
    assert not list(tmp_path.rglob("half"))
    made = copies.copy_of("s3://bucket/a", "1", lambda folder: (folder / "whole").touch())
    assert [path.name for path in made.iterdir()] == ["whole"]


def test_other_sources_keep_their_copies(tmp_path: Path) -> None:
    made = [copies.copy_of(source, "1", lambda folder: None) for source in ("s3://b/one", "s3://b/two")]
    copies.copy_of("s3://b/one", "2", lambda folder: None)
    assert [path.exists() for path in made] == [False, True]


def test_processes_of_a_node_make_one_copy(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from rayllava import copies\n"
        "def fill(folder):\n"
        f"    Path({str(tmp_path)!r}, f'made-{{os.getpid()}}').touch(); time.sleep(1); (folder / 'x').touch()\n"
        "print(copies.copy_of('hub', 'v', fill))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "platform"), "TMPDIR": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = {process.communicate(timeout=60)[0] for process in started}
    assert len(said) == 1 and len(list(tmp_path.glob("made-*"))) == 1


def test_digests_are_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "part"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_bytes(name.encode())
        long_ago = time.time() - 60
        os.utime(folder / name, (long_ago, long_ago))
    expected = {name: durable.digest_bytes(name.encode()) for name in ("a", "b")}
    read: list[str] = []
    digest = durable.digest
    monkeypatch.setattr(durable, "digest", lambda path: read.append(path.name) or digest(path))
    for _ in range(2):
        assert copies.digests(folder, ["a", "b"]) == expected
    assert sorted(read) == ["a", "b"]
    (folder / "b").write_bytes(b"c")
    assert copies.digests(folder, ["a", "b"])["b"] == durable.digest_bytes(b"c")
    assert sorted(read) == ["a", "b", "b"]


def test_a_file_that_was_given_its_old_time_again_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "part" / "a"
    path.parent.mkdir()
    path.write_bytes(b"1")
    said = path.stat()
    assert copies.digests(path.parent, ["a"])["a"] == durable.digest_bytes(b"1")
    with path.open("r+b") as file:
        file.write(b"2")
    os.utime(path, ns=(said.st_atime_ns, said.st_mtime_ns))
    assert copies.digests(path.parent, ["a"])["a"] == durable.digest_bytes(b"2")


def test_a_folder_that_somebody_else_made_is_not_trusted(tmp_path: Path) -> None:
    mine = tmp_path / f"rayllava-{os.getuid()}"
    (tmp_path / "theirs").mkdir()
    mine.symlink_to(tmp_path / "theirs")
    with pytest.raises(ValueError, match="belongs to somebody else; remove it, or set TMPDIR"):
        copies.copy_of("s3://bucket/a", "1", lambda folder: None)
