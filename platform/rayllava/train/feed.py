"""What a worker group is fed: decided once a group, before any of its workers runs.

    Ray Train is about to start W workers -> attempt, checkpoint, cursor, W in RUN/attempts/N.json
                                          -> the rows of every step from the cursor on, dealt to W ranks

This happens in the controller's own process: an actor for it, which is Ray Train's way, would import everything
anew at every restart.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.data_integration.interfaces import DatasetShardMetadata
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from rayllava.checkpoint import store
from rayllava.checkpoint.run import LENGTHS, Decision, RunManifest, read_run
from rayllava.data import stream
from rayllava.data.stream import StreamSpec
from rayllava.place import Place
from rayllava.train import elastic


class Feed(WorkerGroupCallback):
    """Decides an attempt whenever Ray Train starts a worker group, and deals that attempt's rows to it."""

    def __init__(self, run: Place, driver: str) -> None:
        self.run = run
        self.driver = driver
        self._splits: list[Any] = []

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        world_size = worker_group_context.num_workers
        decision = store.decide(self.run, world_size=world_size, driver=self.driver)
        # Not on a node that is gone, to which the cluster gives tasks until it has missed many heartbeats; nor on one
        # that comes, where the first task waits for imports and all rows behind it for that task.
        dataset = stream.rows(stream_spec(read_run(self.run), decision), on=elastic.answering())
        # No locality hints: with them rows are no longer dealt strictly in turn.
        self._splits = dataset.streaming_split(world_size, equal=True, locality_hints=None)

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[_Shard]]:
        return {"dataset_shard_provider": [_Shard(split) for split in self._splits]}

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        for split in self._splits[:1]:  # so that the processes which decode are not killed in the middle of a task
            split._coord_actor.shutdown_executor.remote()

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        self._splits = []  # with its last handle goes the actor that deals them

    def after_worker_group_abort(self, worker_group_context: Any) -> None:
        self._splits = []


class _Shard:
    """What `ray.train.get_dataset_shard` returns in a worker."""

    def __init__(self, split: Any) -> None:
        self.split = split

    def get_dataset_shard(self, dataset_info: DatasetShardMetadata) -> Any:
        return self.split


def stream_spec(manifest: RunManifest, decision: Decision | None = None) -> StreamSpec:
    """Return what an attempt of a run is fed; without a decision, the whole run as one worker would compute it."""
    recipe, run = manifest.recipe, Place(manifest.recipe.out)
    packs = recipe.data.max_tokens is not None
    attempt = decision.model_dump(include={"attempt", "cursor", "world_size"}) if decision else {}
    return StreamSpec(
        shards=recipe.data.shards,
        shards_digest=manifest.shards_digest,
        data=recipe.data,
        seed=recipe.seed,
        processor=manifest.processor,
        tokenizer_dir=(run / "tokenizer").text,
        lengths=(run / LENGTHS).text if packs else "",
        decoders=recipe.scale.decoders,
        **attempt,
    )
