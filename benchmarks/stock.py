"""The peers of benchmarks/spot.py: what one writes after the documentation of Ray Train and Ray Data.

    stock     ScalingConfig(num_workers=(1, 4)), FailureConfig(max_failures=-1) and Ray's own policies; checkpoints
              through ray.train.report, one more when a node announces its end; resumes from ray.train.get_checkpoint
    scratch   a group of fixed size, as torchrun starts it, on the nodes that are there: one that is lost ends the
              job, which somebody starts over, from step 0

Both train the model that we train, in steps of as many samples, with as many in one forward pass. After every start
the epoch is read from its beginning, since neither Ray Train nor Ray Data keeps its place.

    python benchmarks/stock.py CONFIG.json [--scratch] --address ADDRESS
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

DATA_CPUS = 2
"""As many as our recipe's scale.decoders."""


def train(config: dict[str, Any], *, scratch: bool) -> None:
    """Train until somebody ends this process."""
    import ray
    from ray.train.v2.api.exceptions import TrainingFailedError

    if not scratch:
        _trainer(config, name="stock", num_workers=(1, config["workers"]), endless=True).fit()
        return
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # torchrun hears of no notice
    from rayllava.train.elastic import room

    starts = 0
    while True:
        count = min(config["workers"], room(config["resources"]))
        if not count:
            time.sleep(1)
            continue
        starts += 1
        with contextlib.suppress(TrainingFailedError, ray.exceptions.RayError):
            _trainer(config, name=f"start-{starts}", num_workers=count, endless=False).fit()


def _trainer(config: dict[str, Any], *, name: str, num_workers: Any, endless: bool) -> Any:
    import ray
    from ray.data import ExecutionOptions, ExecutionResources
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    shards = sorted(str(path) for path in Path(config["shards"]).glob("*.parquet"))
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_parquet(shards, shuffle="files", override_num_blocks=len(shards))
    words = {"processor": json.dumps(config["processor"]), "tokenizer_dir": config["tokenizer_dir"]}
    dataset = dataset.map_batches(encode, batch_size=64, batch_format="pyarrow", fn_kwargs=words)
    limits = ExecutionResources.for_limits(cpu=DATA_CPUS)
    tries = -1 if endless else 0
    return TorchTrainer(
        loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=num_workers, resources_per_worker=config["resources"]),
        run_config=RunConfig(
            name=name,
            storage_path=config["out"] + "/ray",
            failure_config=FailureConfig(
                max_failures=tries, max_preemption_failures=tries, controller_failure_limit=tries
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
        datasets={"train": dataset},
        dataset_config=DataConfig(execution_options=ExecutionOptions(resource_limits=limits)),
    )


def encode(table: pa.Table, *, processor: str, tokenizer_dir: str) -> pa.Table:
    """Return ids, labels and pixels of rows of shards, as bytes."""
    from rayllava.data.shards import sample_key
    from rayllava.records import Sample, Turn

    made: dict[str, list[Any]] = {"key": [], "ids": [], "labels": [], "pixels": []}
    for row in table.to_pylist():
        key = sample_key(row["source"], row["line"], row["copy"])
        turns = tuple(Turn(**turn) for turn in row["turns"])
        example = _processor(processor, tokenizer_dir).encode(Sample(row["id"], turns, tuple(row["images"]), key))
        made["key"].append(key)
        for name in ("ids", "labels", "pixels"):
            made[name].append(getattr(example, name).tobytes())
    return pa.table(made)


@lru_cache(maxsize=1)
def _processor(text: str, tokenizer_dir: str) -> Any:
    from rayllava.prompt.encode import Processor
    from rayllava.recipe import ProcessorSpec

    return Processor(ProcessorSpec.model_validate_json(text), Path(tokenizer_dir))


def loop(config: dict[str, Any]) -> None:
    """Train on one worker."""
    born = time.time()
    import torch
    from ray import train as ray_train
    from ray.train.torch import prepare_model

    torch.set_num_threads(1)
    rank, world = ray_train.get_context().get_world_rank(), ray_train.get_context().get_world_size()
    model = prepare_model(_model(config))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["lr"], weight_decay=0.0)
    begin, step = 0, 0
    if checkpoint := ray_train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            begin, step = _load(Path(folder), trained, optimizer)
    diary = Diary(Path(config["out"]), rank=rank, world=world, cursor=step, born=born)
    saved_for_notice = False
    shard = ray_train.get_dataset_shard("train")
    for epoch in range(begin, config["epochs"]):
        share = -(-config["global_batch"] // world)
        batches = iter(shard.iter_batches(batch_size=share, prefetch_batches=2, local_shuffle_buffer_size=256))
        while (batch := next(batches, None)) is not None:
            diary.has_data()
            parts = list(_parts(batch, config))
            for number, part in enumerate(parts, 1):
                last = number == len(parts)
                with contextlib.nullcontext() if last or world == 1 else model.no_sync():
                    (_loss(model, part) / len(parts)).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            notice = ray_train.get_preemption_info() is not None
            if step % config["every"] == 0 or (notice and not saved_for_notice):
                saved_for_notice |= notice
                with diary.saving(step):
                    _save(config, trained, optimizer, epoch=epoch, step=step, rank=rank)
            diary.has_done(step, epoch, [str(key) for key in batch["key"]])


def _model(config: dict[str, Any]) -> Any:
    from rayllava.families import FAMILIES
    from rayllava.model.build import build
    from rayllava.model.forward import LossModel
    from rayllava.model.tuning import tune
    from rayllava.recipe import Full, ModelSpec, ProcessorSpec

    parts, processor = ModelSpec(**config["model"]), ProcessorSpec(**config["processor"])
    llava = build(parts, processor, seed=0)
    tune(llava, Full(), FAMILIES[parts.family], seed=0)
    model = LossModel(llava, processor).train()
    llava.model.vision_tower.eval()
    return model


def _parts(batch: dict[str, np.ndarray], config: dict[str, Any]) -> Iterator[Any]:
    """Yield a rank's share of a step in as many samples as one forward pass takes."""
    from rayllava.prompt.collate import collate
    from rayllava.records import Example

    size = config["processor"]["image_size"]
    examples = [
        Example(
            id=str(key),
            ids=np.frombuffer(ids, np.int32),
            labels=np.frombuffer(labels, np.int32),
            pixels=np.frombuffer(pixels, np.uint8).reshape(-1, 3, size, size),
        )
        for key, ids, labels, pixels in zip(
            *(batch[name] for name in ("key", "ids", "labels", "pixels")), strict=True
        )
    ]
    for at in range(0, len(examples), config["atom"]):
        yield collate(examples[at : at + config["atom"]], pad_token_id=config["processor"]["pad_token_id"])


def _loss(model: Any, part: Any) -> Any:
    """Return the mean loss of a part's targets."""
    import torch

    from rayllava.model.forward import tensors

    return model(**tensors(part, torch.device("cpu"))) / max(1, part.num_targets)


def _save(config: dict[str, Any], trained: list[Any], optimizer: Any, *, epoch: int, step: int, rank: int) -> None:
    """Report a checkpoint: rank 0's, as all ranks hold the same."""
    from ray import train as ray_train
    from ray.train import Checkpoint
    from safetensors.torch import save_file

    if rank:
        ray_train.report({"step": step})
        return
    tensors = {f"param.{number}": parameter.detach() for number, parameter in enumerate(trained)}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{name}.{number}": tensor for name, tensor in state.items()}
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{folder}/state.safetensors")
        Path(folder, "place.json").write_text(json.dumps({"epoch": epoch, "step": step}))
        ray_train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder))


def _load(folder: Path, trained: list[Any], optimizer: Any) -> tuple[int, int]:
    """Take over a checkpoint and return its epoch and step."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(folder / "state.safetensors")
    state: dict[int, dict[str, Any]] = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            kind, number = name.split(".")
            if kind == "param":
                trained[int(number)].copy_(tensor)
            else:
                state.setdefault(int(number), {})[kind] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    place = json.loads((folder / "place.json").read_text())
    return place["epoch"], place["step"]


class Diary:
    """What a run says about itself: lines as our RUN/metrics.jsonl has them, and the samples of every rank."""

    def __init__(self, out: Path, *, rank: int, world: int, cursor: int, born: float) -> None:
        import torch

        self.rank, self.world = rank, world
        number = [0]
        if rank == 0:
            for name in ("attempts", "samples"):
                (out / name).mkdir(parents=True, exist_ok=True)
            number = [1 + len(list((out / "attempts").glob("*.json")))]
            told = {"cursor": cursor, "world_size": world, "at": time.time()}
            (out / "attempts" / f"{number[0]}.json").write_text(json.dumps(told))
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(number)
        self.attempt = number[0]
        self.metrics = (out / "metrics.jsonl").open("a", buffering=1)
        self.commits = (out / "commits.jsonl").open("a", buffering=1)
        self.samples = (out / "samples" / f"{self.attempt}-{rank}.jsonl").open("a", buffering=1)
        self.started: dict[str, Any] = {"started": {"worker": born, "engine": time.time()}}
        self.since = self.fed = time.time()
        self.save_s = 0.0

    def has_data(self) -> None:
        self.fed = time.time()

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        began = time.time()
        yield
        self.save_s = time.time() - began
        if self.rank == 0:
            self.commits.write(json.dumps({"step": step, "attempt": self.attempt}) + "\n")

    def has_done(self, step: int, epoch: int, keys: list[str]) -> None:
        self.samples.write(json.dumps({"step": step, "epoch": epoch, "keys": keys}) + "\n")
        now = time.time()
        line = {
            "step": step,
            "epoch": epoch,
            "world_size": self.world,
            "attempt": self.attempt,
            "seconds": now - self.since,
            "data_seconds": self.fed - self.since,
            "save_seconds": self.save_s,
            "time": now,
        }
        if self.rank == 0:
            self.metrics.write(json.dumps(line | self.started) + "\n")
        self.started, self.since, self.save_s = {}, now, 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--scratch", action="store_true")
    parser.add_argument("--address", required=True)
    args = parser.parse_args()
    import ray

    ray.init(address=args.address)
    train(json.loads(args.config.read_text()), scratch=args.scratch)


if __name__ == "__main__":
    from benchmarks import stock

    stock.main()  # workers import what is here by its name
