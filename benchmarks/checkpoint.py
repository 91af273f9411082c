"""What a checkpoint costs the training beside it: make bench-checkpoint, or

    python benchmarks/checkpoint.py [--quick] [--interval 30] [--repetitions 5] [--threads 1,2]

One rank, a gigabyte of weights and moments (float32), the same engine and the same steps for all:

    ours        Engine.gather, then Saver: written, digested and made durable in a thread beside the steps
    torch.save  the same tensors in one file while training waits; not even made durable
    dcp-async   torch.distributed.checkpoint.async_save with its defaults: copied, then written in a thread, durable

A block is so many steps as take the interval, with a checkpoint at its front that has to be finished by its end.
Blocks with each of them and blocks with none take turns in one process. The stall is what a block took longer than
one without a checkpoint: the wait at the front, that at the end, and steps that were slower while it was written.

With a torch thread fewer than cores there is a core to spare, as on a machine whose GPUs train; with as many there is
none. Ray Train's workers have one thread each.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / "platform"), str(ROOT), str(HERE)]

from learner import join  # noqa: E402
from report import keep, machine, say, table, versions  # noqa: E402
from shapes import SHAPES, Job, examples, make_parts, model, processor, tuned  # noqa: E402

TARGET = 0.02
NONE = "none"


class Learner:
    """A model in training, step by step, and the tensors of its state."""

    def __init__(self, job: Job) -> None:
        import torch

        from rayllava.model.forward import LossModel
        from rayllava.prompt.collate import collate, rehearsal
        from rayllava.recipe import DataSpec, Full, OptimSpec, PromptSpec, Recipe, ScaleSpec
        from rayllava.train.engine import Engine

        shape, spec = job.shape, processor(job.shape)
        recipe = Recipe(
            model=model(job),
            prompt=PromptSpec(template=spec.template, max_length=spec.max_length),
            tuning=Full(),
            data=DataSpec(global_batch=shape.step, atom=shape.rows),
            optim=OptimSpec(lr=shape.lr),
            scale=ScaleSpec(device="cpu", dtype="float32", zero=0, checkpointing=False),
        )
        self.engine = Engine(LossModel(tuned(job), spec), recipe, device=torch.device("cpu"))
        self.engine.load(None, step=0, rehearsed=rehearsal(spec, rows=1, positions=16, images=0))
        self.batch = collate(examples(shape, shape.step)[:2], pad_token_id=spec.pad_token_id, packed=True)
        self.done = 0

    def step(self) -> None:
        self.engine.backward(self.batch, num_targets=self.batch.num_targets, last=True, seed=0)
        self.engine.step(1.0)
        self.done += 1

    def state(self) -> dict[str, Any]:
        """Return the live tensors that a checkpoint holds."""
        optimizer = self.engine.optimizer
        named = {n: p for n, p in self.engine.llava.named_parameters() if p.requires_grad}
        state = {f"param/{name}": parameter.data for name, parameter in named.items()}
        for moment in ("exp_avg", "exp_avg_sq"):
            state |= {f"{moment}/{name}": optimizer.state[parameter][moment] for name, parameter in named.items()}
        return state


class Way(NamedTuple):
    """How a state is written; each folder is new."""

    start: Callable[[Learner], Any]
    wait: Callable[[Any], object]


def ours(folder: Path) -> Way:
    from rayllava.checkpoint.ledger import LedgerEntry
    from rayllava.checkpoint.run import Decision, write_decision
    from rayllava.checkpoint.saver import Saver
    from rayllava.checkpoint.store import Store
    from rayllava.place import Place

    run = Place(str(folder))
    write_decision(run, Decision(attempt=1, checkpoint=None, cursor=0, world_size=1, driver="benchmark"))
    saver = Saver(Store(run), attempt=1, rank=0, world_size=1, keep=1)
    saved = 0

    def start(learner: Learner) -> Saver:
        nonlocal saved
        entries = [LedgerEntry(k + 1, 0, 1, 1, {0: (str(k),)}) for k in range(saved, learner.done)]
        saver.start(learner.done, learner.engine.gather(), entries)
        saved = learner.done
        return saver

    return Way(start, lambda saver: saver.wait())


def torch_save(folder: Path) -> Way:
    import torch

    def start(learner: Learner) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(learner.state(), folder / "new.pt")
        (folder / "new.pt").replace(folder / "state.pt")

    return Way(start, lambda _: None)


def dcp_async(folder: Path) -> Way:
    from torch.distributed.checkpoint import async_save

    def start(learner: Learner) -> Any:
        for old in sorted(folder.glob("*"))[:-1]:
            shutil.rmtree(old)
        return async_save(learner.state(), checkpoint_id=folder / f"{learner.done:06d}")

    return Way(start, lambda future: future.result())


WAYS: dict[str, Callable[[Path], Way]] = {"ours": ours, "torch.save": torch_save, "dcp-async": dcp_async}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small state every second, twice; nothing written")
    parser.add_argument("--interval", type=float, default=30.0, help="seconds between two checkpoints")
    parser.add_argument("--repetitions", type=int, default=5)
    cores = os.cpu_count() or 1
    parser.add_argument("--threads", default=f"{max(1, cores - 1)},{cores}", help="torch threads, with commas")
    args = parser.parse_args()
    import torch

    shape, interval = ("small", 1.0) if args.quick else ("gigabyte", args.interval)
    repetitions = 2 if args.quick else args.repetitions
    folder = ROOT / "runs" / "bench-checkpoint"
    job = Job(SHAPES[shape], folder / shape)
    make_parts(job)
    join("cpu")
    learner = Learner(job)
    size = sum(tensor.nbytes for tensor in learner.state().values())
    report: dict[str, Any] = {
        "date": str(date.today()),
        "machine": machine(),
        "versions": versions("torch", "deepspeed"),
        "bytes": size,
        "interval": interval,
        "blocks": {},
    }
    written = folder / "written"
    shutil.rmtree(written, ignore_errors=True)
    ways = {name: make(written / name) for name, make in WAYS.items()}
    for threads in args.threads.split(","):
        torch.set_num_threads(int(threads))
        report["blocks"][threads] = blocks(learner, ways, interval, repetitions)
    shutil.rmtree(written)
    text = render(report)
    print(text, flush=True)
    if not args.quick:
        keep(f"checkpoint-{report['date']}", report, text)
    os._exit(0)  # what DeepSpeed compiled leaves threads behind that now and then abort a clean exit


def blocks(learner: Learner, ways: dict[str, Way], interval: float, num: int) -> dict[str, list[dict[str, float]]]:
    """Return what every block took, by what was saved in it."""
    learner.step()
    began = time.perf_counter()
    for _ in range(3):
        learner.step()
    steps = max(3, round(interval * 3 / (time.perf_counter() - began)))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (NONE, *ways)}
    for name in found:  # the first of each kind pays for what is used for the first time
        block(learner, ways.get(name), min(steps, 5))
    for number in range(num):
        for name in random.Random(number).sample(list(found), len(found)):
            found[name].append(block(learner, ways.get(name), steps))
            say(f"round {number + 1} {name}: " + ", ".join(f"{k} {v:.2f}" for k, v in found[name][-1].items()))
    return found


def block(learner: Learner, way: Way | None, steps: int) -> dict[str, float]:
    """Return the seconds of a block, those of waiting in it, and the CPU time of the process."""
    os.sync()  # nobody pays for what another one left in memory
    load = os.getloadavg()[0]
    began, cpu = time.perf_counter(), time.process_time()
    under_way = way.start(learner) if way else None
    front = time.perf_counter() - began
    for _ in range(steps):
        learner.step()
    end = time.perf_counter()
    if way:
        way.wait(under_way)
    now = time.perf_counter()
    return {
        "seconds": now - began,
        "steps": steps,
        "front": front,
        "end": now - end,
        "cpu": time.process_time() - cpu,
        "load": load,
    }


def render(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    told = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"# Checkpoints, {report['date']}", "", f"{report['machine']}; {told}", ""]
    lines += [f"A state of {report['bytes'] / 1e9:.2f} GB, one checkpoint in {report['interval']:.0f} s.", ""]
    for threads, found in report["blocks"].items():
        middle = {
            name: {key: statistics.median(one[key] for one in ones) for key in ones[0]}
            for name, ones in found.items()
        }
        base = middle[NONE]
        lines += [
            f"## {threads} torch thread{'s' * (threads != '1')}",
            "",
            f"Medians of {len(found[NONE])} blocks of {base['steps']:.0f} steps; without a checkpoint "
            f"{base['seconds']:.2f} s, from {min(one['seconds'] for one in found[NONE]):.2f} to "
            f"{max(one['seconds'] for one in found[NONE]):.2f}; load average {base['load']:.1f}.",
            "",
        ]
        rows, stalls = [], {}
        for name, one in middle.items():
            if name == NONE:
                continue
            more = one["seconds"] - base["seconds"]
            stalls[name] = more / base["seconds"]
            slower = more - one["front"] - one["end"]
            seconds = [more, one["front"], one["end"], slower, one["cpu"] - base["cpu"]]
            rows.append([name, f"{stalls[name]:.2%}", *(f"{value:.2f}" for value in seconds)])
        heads = ["", "stall share", "stall, s", "waits before, s", "waits after, s", "slower steps, s", "more CPU, s"]
        lines += [*table(heads, rows), "", verdict(stalls), ""]
    return "\n".join(lines)


def verdict(stalls: dict[str, float]) -> str:
    mine, best = stalls["ours"], min(stalls, key=lambda name: stalls[name])
    fits = "PASS" if mine <= TARGET or best == "ours" else "MISS"
    return (
        f"- {fits} ours stalls {mine:.2%}, the best is {best} at {stalls[best]:.2%}; target {TARGET:.0%}, or the best"
    )


if __name__ == "__main__":
    main()
