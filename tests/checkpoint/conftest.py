"""A run's place on a disk and in an object store."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayllava.checkpoint.lease import Lease
from rayllava.place import Place
from tests.data.store import bucket


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with bucket("runs") as address:
        yield address


@pytest.fixture(params=["disk", "store"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where copies out of a store go
    if request.param == "disk":
        return Place(str(tmp_path / "run"))
    return Place(request.getfixturevalue("address").format(tmp_path.name))


@pytest.fixture
def driver(run: Place) -> Iterator[str]:
    with Lease(run) as lease:
        yield lease.id
