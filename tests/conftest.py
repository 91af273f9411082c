"""The only place in the tests that starts Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator

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
