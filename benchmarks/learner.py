"""One trainer in a process of its own: the same samples, the same first weights, one epoch.

    ours-*      the loop and the engine that `jobs/finetune.py` runs, fed with batches that lie ready
    trainer-*   transformers' Trainer on transformers' own forward pass, padded by its collator

Stage 2 with a frozen tower on both sides, the same optimizer and schedule, one process without ZeRO. Started by
benchmarks/train.py; prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT), str(Path(__file__).resolve().parent)]

from samples import draw  # noqa: E402
from shapes import SHAPES, Job, Shape, examples, make_parts, model, processor, tuned  # noqa: E402

WARM = 2
"""Steps before the clock starts."""


def ours(job: Job, **data: Any) -> dict[str, Any]:
    from rayllava.checkpoint.lease import Lease
    from rayllava.checkpoint.run import RunManifest, write_run
    from rayllava.checkpoint.store import decide
    from rayllava.data.plan import Plan
    from rayllava.place import Place
    from rayllava.recipe import DataSpec, Full, OptimSpec, PromptSpec, Recipe, SaveSpec, ScaleSpec
    from rayllava.train import loop
    from rayllava.train.meter import read_metrics

    shape = job.shape
    lengths, images = draw(job.steps * shape.step, shrink=shape.shrink)
    spec = processor(shape)
    run = Place(str(job.folder / f"run-{os.getpid()}"))
    recipe = Recipe(
        model=model(job),
        prompt=PromptSpec(template=spec.template, max_length=spec.max_length),
        tuning=Full(),
        data=DataSpec(global_batch=shape.step, atom=shape.rows, **data),
        optim=OptimSpec(lr=shape.lr),
        scale=ScaleSpec(
            device=shape.device,  # type: ignore[arg-type]
            dtype=shape.dtype,  # type: ignore[arg-type]
            zero=0,
            checkpointing=False,
            threads=job.threads,
            peak_tflops=1.0,
        ),
        save=SaveSpec(every=1 << 30),
        out=str(run),
    )
    plan = Plan(
        len(lengths),
        lengths,
        seed=recipe.seed,
        global_batch=shape.step,
        atom=shape.rows,
        images=images,
        group=recipe.data.group,
        max_tokens=recipe.data.max_tokens,
        max_length=spec.max_length,
    )
    join(shape.device)
    manifest = RunManifest(recipe=recipe, processor=spec, shards_digest="", num_steps=plan.num_steps)
    write_run(run, manifest)
    cpu: list[float] = []
    pool = examples(shape, len(lengths))
    feed = _feed(plan, pool, packed=recipe.data.max_tokens is not None, pad=spec.pad_token_id, cpu=cpu)
    with Lease(run) as lease:
        decision = decide(run, world_size=1, driver=lease.id)
        loop.run(manifest, decision, feed, device=loop.worker_device(shape.device), largest=plan.largest())
    lines = read_metrics(run / "metrics.jsonl")
    shutil.rmtree(run.local)
    return {
        "times": [line["time"] for line in lines],
        "cpu": cpu,
        "losses": [line["loss"] for line in lines],
        "tokens": [line["num_tokens"] for line in lines],
        "positions": [line["num_positions"] for line in lines],
        "tflops": [line["mfu"] * line["seconds"] for line in lines],
    }


def _feed(
    plan: Any, pool: list[Any], *, packed: bool, pad: int, cpu: list[float]
) -> Iterator[tuple[int, int, list[Any], list[Any]]]:
    """Yield the steps, and note the CPU time of the process after each."""
    from rayllava.prompt.collate import collate

    for k in range(plan.num_steps):
        atoms = [
            collate([pool[sample] for sample in atom.samples], pad_token_id=pad, packed=packed, index=atom.index)
            for atom in plan.share(k, 1)[0]
        ]
        yield k, 0, atoms, []
        cpu.append(time.process_time())


def trainer(job: Job, *, strategy: str) -> dict[str, Any]:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from rayllava.train.flops import Cost

    shape = job.shape
    torch.set_num_threads(job.threads)
    llava = tuned(job)
    cost = Cost.of(llava, processor(shape))
    collator = Collator(shape)
    pool = [peer_sample(example, shape) for example in examples(shape, job.steps * shape.step)]
    times: list[float] = []
    cpu: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if shape.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.time())
            cpu.append(time.process_time())

    accumulate = shape.step // shape.rows
    out = job.folder / f"trainer-{os.getpid()}"
    made = Trainer(
        model=llava,
        args=TrainingArguments(
            output_dir=str(out),
            per_device_train_batch_size=shape.rows,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=1,
            learning_rate=shape.lr,
            lr_scheduler_type="cosine",
            warmup_steps=int(np.ceil(0.03 * job.steps)),
            max_grad_norm=1.0,
            optim="adamw_torch",
            bf16=shape.dtype == "bfloat16",
            use_cpu=shape.device == "cpu",
            train_sampling_strategy=strategy,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=pool,
        data_collator=collator,
        callbacks=[Clock()],
    )
    made.remove_callback(PrinterCallback)
    made.train()
    shutil.rmtree(out, ignore_errors=True)
    seen = collator.seen

    def a_step(name: str) -> list[int]:
        return [sum(one[name] for one in seen[i : i + accumulate]) for i in range(0, len(seen), accumulate)]

    work = zip(*(a_step(name) for name in ("tokens", "pairs", "targets", "images")), strict=True)
    return {
        "times": times,
        "cpu": cpu,
        "losses": [entry["loss"] for entry in made.state.log_history if "loss" in entry],
        "tokens": a_step("tokens"),
        "positions": a_step("positions"),
        "tflops": [
            cost.flops(tokens=tokens, pairs=pairs, targets=targets, images=images) / 1e12
            for tokens, pairs, targets, images in work
        ],
    }


class Collator:
    """Pads on the right, as the processor of LLaVA does, and counts what it saw."""

    def __init__(self, shape: Shape) -> None:
        self.pad = processor(shape).pad_token_id
        self.seen: list[dict[str, int]] = []

    def __call__(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        ids, labels = ([one[name] for one in batch] for name in ("input_ids", "labels"))
        lengths = [len(one) for one in ids]
        pixels = [one["pixel_values"] for one in batch if "pixel_values" in one]
        made = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        }
        self.seen.append(
            {
                "tokens": sum(lengths),
                "pairs": sum(length**2 for length in lengths),
                "positions": made["input_ids"].numel(),
                "targets": int((made["labels"] != -100).sum()),
                "images": len(pixels),
            }
        )
        return made | ({"pixel_values": torch.cat(pixels)} if pixels else {})


CONTENDERS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "ours-packed": lambda job: ours(job, max_tokens=job.shape.packed),
    "ours-grouped": lambda job: ours(job, group="length"),
    "ours-padded": lambda job: ours(job),
    "trainer-padded": lambda job: trainer(job, strategy="random"),
    "trainer-grouped": lambda job: trainer(job, strategy="group_by_length"),
}


def compare(job: Job) -> dict[str, float]:
    """Return the summed loss of the same samples over their targets: ours packed and padded, and transformers'."""
    import torch

    from rayllava.model.forward import LossModel, tensors
    from rayllava.prompt.collate import collate

    shape = job.shape
    device = torch.device(shape.device)
    llava = tuned(job).to(device, getattr(torch, shape.dtype)).eval()
    spec = processor(shape)
    some = examples(shape, shape.rows)
    losses = {}
    with torch.no_grad():
        for name in ("packed", "padded"):
            batch = collate(some, pad_token_id=spec.pad_token_id, packed=name == "packed")
            loss = LossModel(llava, spec)(**tensors(batch, device))
            losses[f"ours-{name}"] = float(loss) / batch.num_targets
        given = Collator(shape)([peer_sample(example, shape) for example in some])
        given = {key: value.to(device) for key, value in given.items()}
        given["pixel_values"] = given["pixel_values"].to(llava.dtype)
        losses["transformers"] = float(llava(**given).loss)
    return losses


def peer_sample(example: Any, shape: Shape) -> dict[str, Any]:
    """Return an example as transformers' processor gives it, its pixels normalised beforehand."""
    import torch

    from rayllava.model.normalise import normalise

    made = {name: torch.tensor(getattr(example, key), dtype=torch.int64) for name, key in _NAMES.items()}
    if len(example.pixels):
        pixels = torch.tensor(example.pixels)
        made["pixel_values"] = normalise(pixels, processor(shape), dtype=torch.float32)
    return made


_NAMES = {"input_ids": "ids", "labels": "labels"}


def join(device: str) -> None:
    """Become the only rank of a process group."""
    import torch

    here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(here)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl", store=store, rank=0, world_size=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=[*CONTENDERS, "compare", "parts"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    job = Job(SHAPES[args.shape], args.folder, args.steps, args.threads)
    if args.name == "parts":
        make_parts(job)
        result: dict[str, Any] = {}
    elif args.name == "compare":
        result = compare(job)
    else:
        result = CONTENDERS[args.name](job)
    print(json.dumps(result), flush=True)
    os._exit(0)  # what DeepSpeed compiled leaves threads behind that now and then abort a clean exit


if __name__ == "__main__":
    main()
