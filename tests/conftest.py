"""The only place in the tests that starts Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayllava import driver
from rayllava.recipe import ModelSpec, ProcessorSpec


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A Ray cluster of this process alone, with four logical CPUs."""
    from tests.data import store

    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.update(store.ENV)  # the workers that start below write to the tests' own store
    with driver.connect("local", num_cpus=4):
        yield


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A language model and a vision tower on disk, small enough to train in a test."""
    from tests.tiny import make_parts

    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def processor(parts: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> tuple[ProcessorSpec, str]:
    """What turns dialogues into the batches of a model of those parts, and the folder of its tokenizer."""
    from tests.tiny import assembled

    folder = tmp_path_factory.mktemp("tokenizer")
    return assembled(parts, folder, max_length=256), str(folder)


@pytest.fixture(scope="session")
def dialogues(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard folder of 60 little dialogues, two in three with a picture."""
    from rayllava.data.ingest import ShardSpec
    from rayllava.data.sharding import write_shards
    from rayllava.place import Place
    from tests.tiny import write_dialogues

    folder = tmp_path_factory.mktemp("dialogues")
    path = write_dialogues(folder / "raw", num=60)
    spec = ShardSpec(images=str(folder / "raw" / "images"))
    write_shards("llava", Place(str(path)), Place(str(folder / "shards")), spec=spec)
    return folder / "shards"
