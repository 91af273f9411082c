"""What the ranks of test_watch.py run."""

from __future__ import annotations

from typing import Any

import torch

from rayllava.checkpoint.lease import Lease
from rayllava.checkpoint.run import Decision, newest_attempt, read_decision, read_run, write_decision
from rayllava.checkpoint.store import decide
from rayllava.data import stream
from rayllava.place import Place
from rayllava.train import loop
from rayllava.train.feed import stream_spec


def train(runs: list[dict[str, Any]]) -> None:
    """Train prepared runs to their ends, one after the other; with `again`, once more from that checkpoint."""
    torch.set_num_threads(1)
    for task in runs:
        run = Place(task["run"])
        _train(run, None)
        if task.get("again"):
            _train(run, task["again"])


def _train(run: Place, again: int | None) -> None:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    manifest = read_run(run)
    if rank == 0:
        with Lease(run) as lease:
            if again is None:
                decide(run, world_size=world_size, driver=lease.id)
            else:
                name = f"step-{again:06d}"
                made = Decision(attempt=2, checkpoint=name, cursor=again, world_size=world_size, driver=lease.id)
                write_decision(run, made)
    torch.distributed.barrier()
    decision = read_decision(run, newest_attempt(run))
    spec = stream_spec(manifest, decision)
    largest = stream.open_plan(spec).largest()
    feed = stream.stream(spec, rank=rank)
    loop.run(manifest, decision, feed, device=torch.device("cpu"), largest=largest)
    torch.distributed.barrier()
