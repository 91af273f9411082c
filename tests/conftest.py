"""The only place in the tests that starts Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayllava import driver
from rayllava.recipe import ModelSpec


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A Ray cluster of this process alone, with four logical CPUs."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with driver.connect("local", num_cpus=4):
        yield


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A language model and a vision tower on disk, small enough to train in a test."""
    from tests.tiny import make_parts

    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def dialogues(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard folder of 60 little dialogues, two in three with a picture."""
    from rayllava.data.sharding import write_shards
    from tests.tiny import write_dialogues

    folder = tmp_path_factory.mktemp("dialogues")
    path = write_dialogues(folder / "raw", num=60)
    write_shards("llava", path, folder / "shards", images_dir=folder / "raw" / "images")
    return folder / "shards"
