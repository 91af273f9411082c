"""Whole or absent."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rayllava import durable


def test_a_failed_folder_leaves_the_old_one_and_no_trace(tmp_path: Path) -> None:
    with durable.new_dir(tmp_path / "a") as folder:
        (folder / "x").write_text("old")
    with pytest.raises(RuntimeError), durable.new_dir(tmp_path / "a") as folder:
        (folder / "x").write_text("new")
        raise RuntimeError
    assert (tmp_path / "a" / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for name in ("x", "y"):
        with durable.new_dir(tmp_path / "a") as folder:
            (folder / name).touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["y"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """The disk is full for this process: it may not write files of more than 100 bytes."""
    durable.write_text(tmp_path / "a.json", "old")
    code = (
        "import resource, signal, sys; from pathlib import Path; from rayllava import durable\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "durable.write_text(Path(sys.argv[1]), 'new' * 1000)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.json")], capture_output=True)
    assert ended.returncode != 0
    assert (tmp_path / "a.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("size", [0, 10, 4096, 4097, (16 << 20) - 1, 16 << 20, (32 << 20) + 5000])
def test_a_streamed_file_holds_what_was_written_in_pieces_of_any_size(tmp_path: Path, size: int) -> None:
    draw = random.Random(size)
    content = draw.randbytes(size)
    with durable.new_file(tmp_path / "x") as file:
        rest = memoryview(content)
        while rest:
            piece = bytearray(rest[: draw.choice([1, 4096, 5000, 1 << 20, 20 << 20])])
            rest = rest[len(piece) :]
            assert file.write(memoryview(piece)) == len(piece)
            piece[:] = bytes(len(piece))
    assert (tmp_path / "x").read_bytes() == content


class _Uncached(io.FileIO):
    """A file on a file system of a kind; `asked` is whether its writes shall go past the page cache."""

    def __init__(self, path: Path, write: Callable[[bool, memoryview], int]) -> None:
        super().__init__(path, "wb")
        self.may, self.asked, self.uncached = write, False, 0

    def write(self, content: memoryview) -> int:  # type: ignore[override]
        may = self.may(self.asked, content)
        self.uncached += may * self.asked
        return super().write(content[:may])


def _any(asked: bool, content: memoryview) -> int:
    return len(content)


def _none(asked: bool, content: memoryview) -> int:
    if asked:
        raise OSError(errno.EINVAL, "no such writes here")
    return len(content)


def _in_parts(asked: bool, content: memoryview) -> int:
    if asked and len(content) % 4096:
        raise OSError(errno.EINVAL, "not in whole pages")
    return min(len(content), 1_000_001)


@pytest.mark.parametrize("write", [_any, _none, _in_parts])
@pytest.mark.parametrize("knows", [True, False])
def test_a_streamed_file_is_whole_on_any_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[bool, memoryview], int], knows: bool
) -> None:
    def control(file: _Uncached, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL:
            if flags & os.O_DIRECT and not knows:
                raise OSError(errno.EINVAL, "what is that")
            file.asked = bool(flags & os.O_DIRECT)
        return flags

    monkeypatch.setattr(fcntl, "fcntl", control)
    content = random.Random(0).randbytes((16 << 20) + 4096 + 7)
    with _Uncached(tmp_path / "x", write) as file:
        new = durable.NewFile(file)  # type: ignore[arg-type]
        new.write(content)
        new.flush()
    assert (tmp_path / "x").read_bytes() == content
    if knows and write is _any:
        assert file.uncached == (16 << 20) + 4096


def test_an_unwritable_folder_is_named_with_a_cure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"out=.*file/run cannot be written \(.*\); give a folder"):
        durable.check_writable(tmp_path / "file" / "run")


def test_a_digest_depends_on_content_and_not_on_key_order() -> None:
    assert durable.digest_of({"a": 1, "b": [2]}) == durable.digest_of({"b": [2], "a": 1})
    assert durable.digest_of({"a": 1}) != durable.digest_of({"a": 2})
