"""Training on nodes that come and go, against Ray Train as it comes and against starting over: make bench-spot, or

    python benchmarks/spot.py [--trace mixed] [--minutes 28] [--only ours,stock,scratch] [--out runs/bench-spot/mixed]

Several raylets on this machine, each a node for one worker, play a trace of joins, losses and announced losses; each
contender trains the same model on the same shards through the same trace, with a checkpoint after as many steps, on
a cluster of its own with Ray's own settings. What is compared stands in benchmarks/account.py.

A contender that was finished in OUT is not run again; the report goes to benchmarks/results, but for a trial's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]

from benchmarks import availability, verdict  # noqa: E402
from benchmarks.availability import Act  # noqa: E402
from benchmarks.report import machine  # noqa: E402
from rayllava import durable, log, versions  # noqa: E402
from rayllava.place import Place  # noqa: E402
from rayllava.progress import Progress  # noqa: E402
from tests.train.lab import TRAINER, Lab  # noqa: E402

CONTENDERS = ("ours", "stock", "scratch")
MOST = 4
"""Nodes at once."""
GLOBAL_BATCH, ATOM = 24, 2
"""Samples of a step and of a forward pass: twelve of these, which one to four workers share evenly."""
EVERY = 20
"""Steps between checkpoints."""
PICTURES, SHARD_ROWS = 4000, 64
"""Small shards: Ray Data reads and encodes whole ones before it hands out the first of their rows."""
WORK = {"pictures": PICTURES, "global_batch": GLOBAL_BATCH, "atom": ATOM, "save_every": EVERY}
STEPS_A_SECOND = 4
"""More than anybody does, so that the work outlasts the trace."""
HASTY_S = 60
"""A driver that ends so soon after its start is broken."""
LONGEST_MINUTES = 60
"""A trace that takes longer is squeezed when nobody says into how many minutes."""
SQUEEZED_MINUTES = 30


class Data(NamedTuple):
    """What all contenders train, and on what."""

    folder: Path
    num_samples: int

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    def part(self, name: str) -> str:
        return str(self.folder / "parts" / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named = ", ".join(sorted(path.stem for path in (HERE / "traces").glob("*.csv")))
    parser.add_argument("--trace", default="mixed", help=f"{named}, or a file")
    parser.add_argument("--minutes", type=float, help="squeeze or stretch the trace to this length")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="names, with commas")
    parser.add_argument("--out", type=Path, help="default: runs/bench-spot/TRACE")
    args = parser.parse_args()
    os.environ.update(RAY_AUTH_MODE="disabled", TRANSFORMERS_VERBOSITY="error", OMP_NUM_THREADS="1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the raylets are stopped then, too
    log.start()
    path = Path(args.trace) if args.trace.endswith(".csv") else HERE / "traces" / f"{args.trace}.csv"
    changes = availability.few(availability.read(path), most=MOST)
    minutes = args.minutes
    if minutes is None and changes[-1].at_s > 60 * LONGEST_MINUTES:
        minutes = SQUEEZED_MINUTES
    acts = availability.acts(availability.squeezed(changes, minutes) if minutes else changes)
    names = [name for name in CONTENDERS if name in args.only.split(",")]
    if unknown := set(args.only.split(",")) - set(CONTENDERS):
        sys.exit(f"error: --only {','.join(sorted(unknown))}: there are {', '.join(CONTENDERS)}")
    out = (args.out or ROOT / "runs" / "bench-spot" / path.stem).absolute()
    data = make(ROOT / "runs" / "bench-spot" / "data")
    seconds = acts[-1].at_s + availability.TAIL_S
    with Progress("s") as progress:
        progress.add(path.stem, total=round(len(names) * seconds))
        for number, name in enumerate(names):
            row = partial(_show, progress, path.stem, name, number * seconds)
            play(name, acts, seconds, out / name, data, row)
    there = [name for name in CONTENDERS if _finished(out / name, _asked(acts, data))]
    found = {name: verdict.judge(name, out / name, num_samples=data.num_samples) for name in there}
    report = {
        "date": str(date.today()),
        "machine": machine(),
        "versions": versions(),
        "trace": {"name": path.stem, "seconds": seconds, "most": MOST, "acts": [act._asdict() for act in acts]},
        "work": WORK | {"samples": data.num_samples},
        "contenders": found,
    }
    text = verdict.render(report)
    print(text)
    target = out / "report" if path.stem == "trial" else HERE / "results" / f"spot-{report['date']}-{path.stem}"
    durable.write_json(target.with_suffix(".json"), report)
    durable.write_text(target.with_suffix(".md"), text + "\n")


# -- the work ------------------------------------------------------------------------------------------------


def make(folder: Path) -> Data:
    """Write pictures of digits, their dialogues as shards, and the parts of a model, unless they are there."""
    from rayllava import driver
    from rayllava.data.ingest import ShardSpec
    from rayllava.data.sharding import write_shards
    from rayllava.data.shards import ShardManifest
    from rayllava.demo.pictures import make_pictures
    from tests.tiny import assembled, make_parts

    done = folder / "done.json"
    if not done.is_file() or json.loads(done.read_text()) != [PICTURES, SHARD_ROWS]:
        shutil.rmtree(folder, ignore_errors=True)
        make_pictures(folder / "pictures", num_train=PICTURES, num_eval=6)
        write_shards(
            "llava",
            Place(str(folder / "pictures" / "train" / "finetune.json")),
            Place(str(folder / "shards")),
            spec=ShardSpec(images=str(folder / "pictures" / "train" / "images"), rows=SHARD_ROWS),
            connect=lambda: driver.connect("local", num_cpus=2),
        )
        parts = make_parts(folder / "parts")
        processor = assembled(parts, folder / "tokenizer", max_length=512)
        durable.write_json(folder / "processor.json", processor.model_dump())
        durable.write_json(done, [PICTURES, SHARD_ROWS])
    return Data(folder, ShardManifest.load(folder / "shards").num_samples)


def words(name: str, out: Path, data: Data, seconds: float) -> list[str]:
    """Return the command of a contender's driver."""
    epochs = -(-round(STEPS_A_SECOND * seconds) * GLOBAL_BATCH // data.num_samples)
    resources = {TRAINER: 1}
    if name == "ours":
        return [
            "jobs/finetune.py",
            "tiny.finetune",
            f"data={data.shards}",
            f"out={out / 'run'}",
            f"model.llm={data.part('llm')}",
            f"model.vision={data.part('vision')}",
            "model.family=vicuna",
            f"data.global_batch={GLOBAL_BATCH}",
            f"data.atom={ATOM}",
            f"data.epochs={epochs}",
            f"save.every={EVERY}",
            f"scale.workers=1:{MOST}",
            "scale.zero=0",  # data parallel, as the others
            f"scale.resources={json.dumps(resources)}",
        ]
    config = {
        "shards": str(data.shards),
        "out": str(out / "run"),
        "model": {"llm": data.part("llm"), "vision": data.part("vision"), "family": "vicuna"},
        "processor": json.loads((data.folder / "processor.json").read_text()),
        "tokenizer_dir": str(data.folder / "tokenizer"),
        "global_batch": GLOBAL_BATCH,
        "atom": ATOM,
        "epochs": epochs,
        "every": EVERY,
        "lr": 1e-3,
        "workers": MOST,
        "resources": resources,
    }
    durable.write_json(out / "config.json", config)
    return ["benchmarks/stock.py", str(out / "config.json"), *["--scratch"] * (name == "scratch")]


# -- the trace -----------------------------------------------------------------------------------------------


def play(
    name: str, acts: list[Act], seconds: float, out: Path, data: Data, show: Callable[[float, str], None]
) -> None:
    """Train through a trace and write down in OUT/record.json what was done when, unless it is there."""
    asked = _asked(acts, data)
    if _finished(out, asked):
        show(seconds, "was finished")
        return
    shutil.rmtree(out, ignore_errors=True)
    (out / "lab").mkdir(parents=True)
    done: list[tuple[float, Act]] = []
    load = os.getloadavg()[0]
    with Lab(out / "lab", quick=False) as lab:
        nodes: dict[str, Any] = {}
        waiting = list(acts)
        while waiting and waiting[0].at_s <= 0:
            done.append((time.time(), _do(lab, waiting.pop(0), nodes)))
        driver = lab.start(*words(name, out, data, seconds))
        start = began = time.time()
        ended: list[tuple[float, int]] = []
        while (passed := time.time() - start) < seconds:
            if driver.poll() is not None:  # somebody would start it again
                if time.time() - began < HASTY_S:
                    raise RuntimeError(
                        f"{name} ended with {driver.returncode}; its last log in {out / 'lab'} says why"
                    )
                ended.append((time.time(), driver.returncode))
                driver, began = lab.start(*words(name, out, data, seconds)), time.time()
            if waiting and waiting[0].at_s <= passed:
                done.append((time.time(), waiting[0]))
                _do(lab, waiting.pop(0), nodes)
            show(passed, f"{_newest(out / 'run')}, {len(nodes)} nodes")
            time.sleep(0.2)
        end = time.time()
    record = {
        "asked": asked,
        "load": load,
        "start": start,
        "end": end,
        "ended": ended,
        "done": [[at, list(act)] for at, act in done],
    }
    durable.write_json(out / "record.json", record)


def _asked(acts: list[Act], data: Data) -> dict[str, Any]:
    return {"work": WORK | {"samples": data.num_samples}, "acts": [list(act) for act in acts]}


def _finished(out: Path, asked: dict[str, Any]) -> bool:
    """Say whether a contender has been through this trace with this work."""
    record = out / "record.json"
    return record.is_file() and json.loads(record.read_text())["asked"] == asked


def _show(progress: Progress, row: str, name: str, before: float, passed: float, note: str) -> None:
    progress.at(row, round(before + passed), note=f"{name}: {note}")


def _do(lab: Lab, act: Act, nodes: dict[str, Any]) -> Act:
    if act.kind == "join":
        nodes[act.node] = lab.join()
    elif act.kind == "notice":
        lab.drain(nodes[act.node], seconds=act.notice_s)
    else:
        lab.kill(nodes.pop(act.node))
    return act


def _newest(run: Path) -> str:
    """Return where a run is, from the end of its metrics."""
    with contextlib.suppress(FileNotFoundError, IndexError), (run / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        line = json.loads(file.read().splitlines(keepends=True)[-2])  # the last may not be whole
        return f"step {line['step']}, {line['world_size']} workers"
    return "no second step yet"


if __name__ == "__main__":
    main()
