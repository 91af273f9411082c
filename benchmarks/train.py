"""Training throughput: make bench-train, or

    python benchmarks/train.py [--quick] [--gpu] [--repetitions 5] [--only ours-packed,trainer-padded]

First the plan alone, on lengths like those of LLaVA-Mix-665K (benchmarks/samples.py) and steps of 128 samples: which
share of what the ranks compute, the slowest one's positions times their number, is of use. `in lockstep` takes the
slowest of every slot instead, as ZeRO-3 does, whose ranks wait for each other in every layer.

Then ours beside transformers' Trainer: the same model, first weights, samples, optimizer and schedule, in turns, each
time in a fresh process (benchmarks/learner.py). Useful tokens are those of samples, not of padding. Before that one
batch goes through both forward passes, whose losses must be equal. The Trainer groups by length among a quarter of an
epoch's samples, 50 batches at most: fewer here than in a real epoch, so it pads more than it would there.

`--gpu` takes a model with the width and the pictures of a 7B and half of its layers, in bfloat16, and tells MFU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / "platform"), str(ROOT), str(HERE)]

from learner import CONTENDERS, WARM  # noqa: E402
from report import keep, machine, say, table, versions  # noqa: E402
from samples import MAX_LENGTH, draw  # noqa: E402
from shapes import SHAPES  # noqa: E402

GLOBAL_BATCH = 128
WORKERS = (1, 2, 3, 4, 6, 8)
PLANS: dict[str, dict[str, Any]] = {
    "packed, max_tokens=2048": {"max_tokens": 2048},
    "packed, max_tokens=4096": {"max_tokens": 4096},
    "packed, max_tokens=8192": {"max_tokens": 8192},
    "group=length": {"group": "length"},
    "group=modality": {"group": "modality"},
    "as they come": {},
}
LEAST_SHARE = {1: 0.93, 8: 0.90}
"""Promised of the better known plans: packed at 2048 or 4096, and group=length."""
PROMISED = ("packed, max_tokens=2048", "packed, max_tokens=4096", "group=length")
TARGETS = (("ours-packed", "trainer-padded", 1.5), ("ours-packed", "trainer-grouped", 1.0))

SAME = {"float32": 1e-5, "bfloat16": 1e-3}
"""How far apart, relatively, the losses of one batch may be."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, one repetition, nothing written")
    parser.add_argument("--gpu", action="store_true", help="half of a 7B in bfloat16 on one GPU")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, help="optimizer steps of a run, the first two of which do not count")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads on a CPU")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="names, with commas")
    args = parser.parse_args()
    os.environ.update(TRANSFORMERS_VERBOSITY="error", OMP_NUM_THREADS=str(args.threads))
    shape = "7b-half" if args.gpu else "trial" if args.quick else "small"
    steps = args.steps or (6 if args.quick else 24)
    report: dict[str, Any] = {
        "date": str(date.today()),
        "machine": machine(),
        "versions": versions("torch", "transformers", "deepspeed", "accelerate"),
        "plan": plan_shares(20_000 if args.quick else 40_000),
        "shape": SHAPES[shape]._asdict() | {"name": shape, "steps": steps, "threads": args.threads},
    }
    folder = ROOT / "runs" / "bench-train" / shape
    run("parts", folder, shape, 1)
    report["losses"] = run("compare", folder, shape, 1)
    say("one batch: " + ", ".join(f"{name} {loss:.6f}" for name, loss in report["losses"].items()))
    report["rounds"] = rounds(folder, shape, steps, args.only.split(","), 1 if args.quick else args.repetitions)
    if args.gpu:
        report |= gpu()
    text = render(report)
    print(text)
    if not args.quick:
        keep(f"train-{report['date']}{'-gpu' if args.gpu else ''}", report, text)


def plan_shares(num: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the useful share of every plan at every number of workers, alone and in lockstep."""
    from rayllava.data.plan import Plan

    lengths, images = draw(num)
    shares: dict[str, dict[str, tuple[float, float]]] = {}
    for name, words in PLANS.items():
        plan = Plan(
            num, lengths, seed=0, global_batch=GLOBAL_BATCH, atom=16, images=images, max_length=MAX_LENGTH, **words
        )
        fit = [workers for workers in WORKERS if workers <= plan.max_workers]
        shares[name] = {str(workers): plan_share(plan, workers, lengths) for workers in fit}
    return shares


def plan_share(plan: Any, workers: int, lengths: Any) -> tuple[float, float]:
    """Return useful positions over W times the slowest rank's, and over those of ranks that wait at every slot."""
    dummy = 2  # positions
    useful = alone = lockstep = 0
    for k in range(plan.num_steps):
        costs = [[dummy if atom is None else atom.cost for atom in hand] for hand in plan.share(k, workers)]
        useful += int(lengths[plan.step(k).samples].sum())
        alone += workers * max(map(sum, costs))
        lockstep += workers * sum(map(max, zip(*costs, strict=True)))
    return useful / alone, useful / lockstep


def rounds(folder: Path, shape: str, steps: int, names: list[str], num: int) -> dict[str, list[dict[str, Any]]]:
    """Return what every trainer did; they take turns, each round in another order."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(num):
        for name in random.Random(number).sample(names, len(names)):
            one = rates(run(name, folder, shape, steps)) | {"load": os.getloadavg()[0]}
            say(f"round {number + 1} {name}: {one['tokens_per_second']:.0f} useful tokens/s, loss {one['end']:.4f}")
            found[name].append(one)
    return found


def rates(told: dict[str, Any]) -> dict[str, Any]:
    """Return rates over the steps after the first ones; ours saves in the last step, so that one is left out too."""
    first, last = WARM, len(told["times"]) - 1
    seconds = told["times"][last - 1] - told["times"][first - 1]
    cpu = told["cpu"][last - 1] - told["cpu"][first - 1]
    tokens, positions, tflops = (sum(told[name][first:last]) for name in ("tokens", "positions", "tflops"))
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu,
        "useful": tokens / positions,
        "tflops_per_second": tflops / seconds,
        "end": statistics.mean(told["losses"][-3:]),
        "losses": told["losses"],
    }


def run(name: str, folder: Path, shape: str, steps: int) -> dict[str, Any]:
    words = [sys.executable, str(HERE / "learner.py"), name, str(folder), "--shape", shape, "--steps", str(steps)]
    words += ["--threads", os.environ["OMP_NUM_THREADS"]]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def gpu() -> dict[str, Any]:
    import torch

    from rayllava.train.flops import peak_of

    name = torch.cuda.get_device_name()
    return {"gpu": name, "peak_tflops": peak_of(name)}


def render(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    told = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"# Training, {report['date']}", "", f"{report.get('gpu', '')} {report['machine']}; {told}".strip(), ""]
    lines += [
        f"## What the plan leaves of use, at steps of {GLOBAL_BATCH} samples",
        "",
        "The slowest rank's positions against all ranks' useful ones; in brackets, ranks that wait at every atom.",
        "",
    ]
    heads = ["plan", *(f"W={workers}" for workers in WORKERS)]
    rows = []
    for name, by_workers in report["plan"].items():
        pairs = [by_workers.get(str(workers)) for workers in WORKERS]
        rows.append([name, *(f"{pair[0]:.3f} ({pair[1]:.3f})" if pair else "" for pair in pairs)])
    lines += [*table(heads, rows), "", *plan_verdicts(report["plan"]), ""]
    return "\n".join(lines + trainer_lines(report))


def plan_verdicts(plan: dict[str, dict[str, tuple[float, float]]]) -> list[str]:
    return [
        f"- {'PASS' if plan[name][str(workers)][0] >= least else 'MISS'} {name}: "
        f"{plan[name][str(workers)][0]:.3f} at W={workers}, target {least}"
        for name in PROMISED
        for workers, least in LEAST_SHARE.items()
    ]


def trainer_lines(report: dict[str, Any]) -> list[str]:
    shape = report["shape"]
    rounds_ = report["rounds"]
    middle = {
        name: {key: statistics.median(one[key] for one in ones) for key in ones[0] if key != "losses"}
        for name, ones in rounds_.items()
    }
    losses = report["losses"]
    off = max(abs(loss / losses["transformers"] - 1) for loss in losses.values())
    peak = report.get("peak_tflops")
    spread = max(
        max(one["tokens_per_second"] for one in ones) / min(one["tokens_per_second"] for one in ones) - 1
        for ones in rounds_.values()
    )
    num = len(next(iter(rounds_.values())))
    load = max(one["load"] for one in middle.values())
    lines = [
        f"## Useful tokens a second, model `{shape['name']}`, {shape['dtype']} on {shape['device']}",
        "",
        f"Hidden {shape['hidden']}, {shape['layers']} layers, tower {shape['tower_hidden']} x "
        f"{shape['tower_layers']}, {shape['step']} samples a step, {shape['rows']} a padded pass, {shape['packed']} "
        f"positions a packed one, pictures and texts {shape['shrink']} times shorter than LLaVA's, {shape['steps']} "
        f"steps. Medians of {num}; the widest spread of one trainer is {spread:.0%}, load average {load:.1f}.",
        "",
        f"The loss of one batch: {losses}; they differ by {off:.1e}.",
        "",
    ]
    against = [name for name in ("trainer-padded", "trainer-grouped") if name in middle]
    heads = [
        "trainer",
        "tokens/s",
        "tokens/CPU s",
        "useful share",
        "TFLOP/s",
        "MFU",
        *(f"/ {name}" for name in against),
        "last loss",
    ]
    rows = []
    for name, one in middle.items():
        ratios = [f"{one['tokens_per_second'] / middle[other]['tokens_per_second']:.2f}" for other in against]
        mfu = f"{one['tflops_per_second'] / peak:.1%}" if peak else ""
        cells = [name, *(f"{one[key]:.0f}" for key in ("tokens_per_second", "tokens_per_cpu_second"))]
        cells += [f"{one['useful']:.3f}", f"{one['tflops_per_second']:.3g}"]
        rows.append([*cells, mfu, *ratios, f"{one['end']:.4f}"])
    lines += [*table(heads, rows), ""]
    for mine, theirs, least in TARGETS:
        if {mine, theirs} <= middle.keys():
            ratio = middle[mine]["tokens_per_second"] / middle[theirs]["tokens_per_second"]
            verdict = "PASS" if ratio >= least else "MISS"
            by_cpu = middle[mine]["tokens_per_cpu_second"] / middle[theirs]["tokens_per_cpu_second"]
            lines.append(f"- {verdict} {mine} at {ratio:.2f} x {theirs} ({by_cpu:.2f} by CPU time), target {least}")
    most = SAME[shape["dtype"]]
    lines.append(f"- {'PASS' if off <= most else 'MISS'} one batch has one loss: off by {off:.1e}, target {most:.0e}")
    return lines


if __name__ == "__main__":
    main()
