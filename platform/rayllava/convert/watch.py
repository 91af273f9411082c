"""How far the reading of a model's tensors is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rayllava.checkpoint.layouts import StoredModel
from rayllava.checkpoint.shards import num_bytes
from rayllava.checkpoint.weights import Held
from rayllava.progress import Progress


@contextmanager
def watched(name: str, stored: StoredModel, *, times: int = 1) -> Iterator[StoredModel]:
    """Yield the model, whose tensors say when they are read, and show how far `times` readings of all are."""
    total = times * sum(num_bytes(held) for held in stored.weights.values()) // 1_000_000
    done = 0
    with Progress("MB") as progress:
        progress.add(name, total=total)

        def seen(held: Held) -> None:
            nonlocal done
            done += num_bytes(held)
            progress.at(name, min(done // 1_000_000, total))

        yield stored.watched(seen)
        progress.at(name, total)
