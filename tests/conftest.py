"""The only place in the tests that starts Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from rayllava import driver


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A Ray cluster of this process alone, with four logical CPUs."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with driver.connect("local", num_cpus=4):
        yield
