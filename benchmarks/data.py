"""The data path against its peers, side by side: make bench-data, or

    python benchmarks/data.py [--quick] [--repetitions 5] [--sides 640] [--only ours-exact,torch-hf]

The same JPEG files through every loader of benchmarks/contender.py, on the same cores, in turns, each time in a fresh
process. Medians go to the screen and to benchmarks/results/. What the columns are:

    img/s        slope through the arrivals of batches for some seconds after a warm-up, in the middle of an epoch;
                 through Ray the warm-up is an epoch longer, for the first use of the object store's memory is slow
    CPU ms       CPU time of the loader's process tree per picture, in the same span: immune to a busy machine
    first        from the start of the process, imports and Ray included, to the pictures of one optimizer step
    PSS          highest sum of the proportional set sizes of the tree, read from /proc every two seconds
    resume       from the ready process, imports and Ray up, to the first step when an epoch goes on at 10, 50, 90 %
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / "platform"), str(ROOT), str(HERE)]

from contender import BATCH, CONTENDERS  # noqa: E402
from pictures import files, make  # noqa: E402
from report import keep, machine, say  # noqa: E402

WORKERS = (2, 3)
"""Tried for every loader; the better one is measured."""
RESUMED = (0.1, 0.5, 0.9)


class Set(NamedTuple):
    """Pictures of one size, and how much of them a measurement takes."""

    side: int
    num: int
    step: int
    warm: int
    """Pictures before the clock starts."""
    seconds: float

    @property
    def folder(self) -> Path:
        return ROOT / "runs" / "bench-data" / f"{self.side}-{self.num}"


FULL = (Set(640, 2000, step=128, warm=256, seconds=7), Set(2048, 300, step=32, warm=64, seconds=7))
QUICK = (Set(640, 256, step=32, warm=32, seconds=1), Set(2048, 64, step=16, warm=16, seconds=1))


class Target(NamedTuple):
    """A promise: `ours` is at least `least` times as fast as `theirs`."""

    side: int
    ours: str
    theirs: str
    least: float


TARGETS = (
    Target(640, "ours-exact", "torch-hf", 1.3),
    Target(640, "ours-fast", "torch-hf", 2.0),
    Target(2048, "ours-fast", "torch-hf", 4.0),
    Target(640, "ours-exact-ray", "ours-exact", 0.75),
    Target(640, "ours-fast-ray", "ours-fast", 0.75),
    Target(640, "ours-exact-ray", "ray-webdataset", 3.0),
    Target(640, "ours-fast-ray", "ray-webdataset", 3.0),
    Target(640, "ours-exact-ray", "ray-webdataset-default", 3.0),
    Target(2048, "ours-fast-ray", "ray-webdataset", 3.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few pictures, one repetition, nothing written")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", default=",".join(CONTENDERS), help="names, with commas")
    parser.add_argument("--sides", default="640,2048", help="sizes of pictures, with commas")
    args = parser.parse_args()
    os.environ.update(RAY_AUTH_MODE="disabled", TRANSFORMERS_VERBOSITY="error", OMP_NUM_THREADS="1")
    names = args.only.split(",")
    sets = [one for one in (QUICK if args.quick else FULL) if str(one.side) in args.sides.split(",")]
    for pictures in sets:
        make(pictures.folder, side=pictures.side, num=pictures.num)
        say(f"{pictures.folder}: {pictures.num} pictures")
    report: dict[str, Any] = {"date": str(date.today()), "machine": machine(), "batch": BATCH}
    report["off"] = {str(one.side): fast_error(one) for one in sets}
    report["equal"] = {str(one.side): compare(one, names) for one in sets}
    report["workers"] = workers = {name: tune(sets[0], name) for name in names}
    repetitions = 1 if args.quick else args.repetitions
    report["rates"] = {str(one.side): rounds(one, names, workers, repetitions) for one in sets}
    report["resume"] = resumes(sets[0], names, workers, min(2, repetitions))
    report["targets"] = [
        judge(target, report["rates"])
        for target in TARGETS
        if str(target.side) in report["rates"] and {target.ours, target.theirs} <= {*names}
    ]
    text = render(report)
    print(text)
    if not args.quick:
        keep(f"data-{report['date']}-{'-'.join(report['rates'])}", report, text)


def fast_error(pictures: Set) -> dict[str, float]:
    """Return how far fast is from exact, in grey levels of 255."""
    from rayllava.prompt import pixels
    from rayllava.recipe import ProcessorSpec

    exact = ProcessorSpec.model_validate_json((pictures.folder / "processor.json").read_text())
    contents = [path.read_bytes() for path in files(pictures.folder)[:200]]
    squares = [
        np.stack([pixels.load(content, spec=exact.but(pixels=way)).astype(int) for content in contents])
        for way in ("exact", "fast")
    ]
    off = np.abs(squares[0] - squares[1])
    return {"mean": float(off.mean()), "p99": float(np.percentile(off, 99)), "max": int(off.max())}


def compare(pictures: Set, names: list[str]) -> dict[str, bool]:
    """Return which loaders give exactly the squares, as a set, that ours-exact gives."""
    wanted = run(pictures, "ours-exact")
    assert wanted["num"] == pictures.num
    found = {name: run(pictures, name) == wanted for name in names if "fast" not in name}
    assert all(found.values()), f"not the same squares: {found}"
    return found


def tune(pictures: Set, name: str) -> int:
    """Return the number of workers with which a loader is fastest here."""
    rates = {count: run(pictures, name, workers=count, measure=True)["rate"] for count in WORKERS}
    say(f"{name}: " + ", ".join(f"{count} workers {rate:.0f}/s" for count, rate in rates.items()))
    return max(rates, key=lambda count: rates[count])


def rounds(pictures: Set, names: list[str], workers: dict[str, int], num: int) -> dict[str, dict[str, float]]:
    """Return medians of loaders that take turns, each round in another order."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(num):
        for name in random.Random(number).sample(names, len(names)):
            one = run(pictures, name, workers=workers.get(name, 2), measure=True)
            say(f"round {number + 1} {pictures.side} {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in one.items()))
            found[name].append(one)
    return {
        name: {key: statistics.median(one[key] for one in ones) for key in ones[0]} for name, ones in found.items()
    }


def resumes(pictures: Set, names: list[str], workers: dict[str, int], num: int) -> dict[str, dict[str, float]]:
    """Return the median seconds to the first step at every place of the epoch."""
    found: dict[str, dict[str, list[float]]] = {name: {str(part): [] for part in RESUMED} for name in names}
    for number in range(num):
        for part in RESUMED:
            start = int(pictures.num * part) // pictures.step * pictures.step
            for name in random.Random(number).sample(names, len(names)):
                if "fast" not in name:
                    one = run(pictures, name, workers=workers.get(name, 2), start=start, stop=pictures.step)
                    found[name][str(part)].append(one["resume_s"])
    return {
        name: {part: statistics.median(times) for part, times in parts.items()}
        for name, parts in found.items()
        if parts[str(RESUMED[0])]
    }


def run(
    pictures: Set, name: str, *, workers: int = 2, start: int = 0, measure: bool = False, stop: int | None = None
) -> dict[str, Any]:
    """Run a loader in a process of its own and return what it reports, with the memory of its process tree."""
    words = [sys.executable, str(HERE / "contender.py"), name, str(pictures.folder), "--step", str(pictures.step)]
    words += ["--workers", str(workers), "--start", str(start), "--launched", str(time.monotonic())]
    if measure:
        warm = pictures.warm + ("ray" in name) * pictures.num
        words += ["--warm", str(warm), "--seconds", str(pictures.seconds), "--epochs", "4"]
    elif stop is not None:
        words += ["--stop", str(stop)]
    load = os.getloadavg()[0]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    most = 0
    try:
        while child.poll() is None:
            most = max(most, _pss(child.pid))
            time.sleep(2)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # its session: workers that it left behind
    assert child.stdout is not None
    lines = child.stdout.read().strip().splitlines()
    if child.returncode or not lines:
        raise RuntimeError(f"{' '.join(words)} ended with {child.returncode}")  # what it said stands on stderr
    found: dict[str, Any] = json.loads(lines[-1])
    return found | ({"pss_mib": most / 2**20, "load": load} if measure else {})


def _pss(pid: int) -> int:
    """Return the memory of a process and all below it; what several share is counted once."""
    total = 0
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in tree:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except (OSError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def judge(target: Target, rates: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    mine, theirs = (rates[str(target.side)][name] for name in (target.ours, target.theirs))
    ratio = mine["rate"] / theirs["rate"]
    return target._asdict() | {
        "ratio": ratio,
        "ratio_by_cpu": theirs["cpu_ms"] / mine["cpu_ms"],
        "verdict": "PASS" if ratio >= target.least else "MISS",
    }


def render(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    load = statistics.median(one["load"] for rates in report["rates"].values() for one in rates.values())
    lines = [f"# Data path, {report['date']}", "", f"{report['machine']}; load average before a run {load:.1f}", ""]
    for side, rates in report["rates"].items():
        off = report["off"][side]
        lines += [
            f"## JPEG of {side} px to 336 px, padded",
            "",
            f"fast is off exact by {off['mean']:.4f} of 255 levels, p99 {off['p99']:.0f}, at most {off['max']}.",
            "",
            "| loader | img/s | img/s a core | CPU ms | first, s | PSS, MiB | exact / it | fast / it |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for name, one in rates.items():
            ratios = [
                f"{rates[ours]['rate'] / one['rate']:.2f}" if ours in rates else ""
                for ours in ("ours-exact", "ours-fast")
            ]
            cells = [f"{one['rate']:.0f}", f"{one['rate'] / (os.cpu_count() or 1):.0f}", f"{one['cpu_ms']:.2f}"]
            cells += [f"{one['first_s']:.1f}", f"{one['pss_mib']:.0f}", *ratios]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "## Seconds to the first step after a restart",
        "",
        "| loader | 10 % | 50 % | 90 % |",
        "|---|--:|--:|--:|",
    ]
    for name, parts in report["resume"].items():
        lines.append(f"| {name} | " + " | ".join(f"{parts[str(part)]:.2f}" for part in RESUMED) + " |")
    settings = ", ".join(f"{name} {count}" for name, count in report["workers"].items())
    lines += [
        "",
        f"Workers, the best of {WORKERS}: {settings}; prefetch_factor 4, one torch thread, batches of {BATCH}.",
        "",
    ]
    for one in report["targets"]:
        lines.append(
            f"- {one['verdict']} {one['side']} px: {one['ours']} at {one['ratio']:.2f} x {one['theirs']} "
            f"({one['ratio_by_cpu']:.2f} by CPU time), target {one['least']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
