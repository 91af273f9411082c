"""Whole or absent."""

from __future__ import annotations

import subprocess
import sys
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


def test_an_unwritable_folder_is_named_with_a_cure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"out=.*file/run cannot be written \(.*\); give a folder"):
        durable.check_writable(tmp_path / "file" / "run")


def test_a_digest_depends_on_content_and_not_on_key_order() -> None:
    assert durable.digest_of({"a": 1, "b": [2]}) == durable.digest_of({"b": [2], "a": 1})
    assert durable.digest_of({"a": 1}) != durable.digest_of({"a": 2})
