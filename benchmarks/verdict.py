"""What the contenders of benchmarks/spot.py made of a trace, from what they left in their folders; the report."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from benchmarks import account
from benchmarks.availability import Act
from rayllava.place import Place
from rayllava.train import goodput
from rayllava.train.meter import read_lines


def judge(name: str, out: Path, *, num_samples: int) -> dict[str, Any]:
    """Return what a contender made of the trace."""
    record = json.loads((out / "record.json").read_text())
    start, end = record["start"], record["end"]
    done = [(at, Act(*act)) for at, act in record["done"]]
    lines = [line for line in read_lines(Place(str(out / "run" / "metrics.jsonl"))) if line["time"] <= end]
    read = _ours if name == "ours" else _stock
    cursors, decided, committed, samples = read(out / "run")
    counting = account.kept(lines, cursors, committed)
    waiting = account.without_nodes(done, least=1, end=end)
    spent = goodput.spend(lines, counting, start=start, end=end, waiting=waiting)
    steps = [samples[line["attempt"], line["step"]] for line in counting]
    seams = account.recoveries(lines, done, decided)
    kinds = ("loss", "announced loss", "join", "none")
    found = {
        "steps": len(counting),
        "load": record["load"],
        "attempts": len(cursors),
        "drivers": 1 + len(record["ended"]),
        "spent": spent._asdict(),
        "usual": goodput.step_times(lines),
        "samples": account.count(steps, num_samples=num_samples)._asdict(),
        "recovery": {kind: account.quantiles([seam.first for seam in seams if seam.kind == kind]) for kind in kinds},
        "beyond": {
            kind: account.quantiles([seam.beyond for seam in seams if seam.kind == kind and seam.beyond])
            for kind in kinds
        },
        "seams": [seam._asdict() for seam in seams],
    }
    if name == "ours":
        from rayllava.train.audit import audit

        found["audit"] = audit(Place(str(out / "run"))).text()
    return found


Read = tuple[dict[int, int], dict[int, float], int, dict[tuple[int, int], tuple[int, list[str]]]]
"""Cursor and time of each attempt's decision, the last checkpoint's step, epoch and samples by (attempt, step)."""


def _ours(run_dir: Path) -> Read:
    from rayllava.checkpoint import ledger
    from rayllava.checkpoint.run import decisions
    from rayllava.checkpoint.store import Store

    run = Place(str(run_dir))
    found = decisions(run, {})
    checkpoint = Store(run).latest()
    samples = {
        (entry.attempt, entry.step): (entry.epoch, [key for keys in entry.atoms.values() for key in keys])
        for segment in ledger.chain(run, checkpoint.manifest.ledger if checkpoint else None)
        for entry in segment.entries
    }
    return (
        {number: decision.cursor for number, decision in found.items()},
        {number: decision.at for number, decision in found.items()},
        checkpoint.manifest.step if checkpoint else 0,
        samples,
    )


def _stock(run: Path) -> Read:
    cursors = {
        int(path.stem): int(json.loads(path.read_text())["cursor"]) for path in (run / "attempts").glob("*.json")
    }
    samples: dict[tuple[int, int], tuple[int, list[str]]] = {}
    for path in (run / "samples").glob("*.jsonl"):
        attempt = int(path.stem.partition("-")[0])
        for text in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a worker that was killed
                line = json.loads(text)
                samples.setdefault((attempt, line["step"]), (line["epoch"], []))[1].extend(line["keys"])
    commits = [json.loads(text) for text in (run / "commits.jsonl").read_text().splitlines()]
    last = max(cursors, default=0)
    committed = max([cursors.get(last, 0), *(line["step"] for line in commits if line["attempt"] == last)])
    return cursors, {}, committed, samples


# -- the report ----------------------------------------------------------------------------------------------


def render(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    trace, found, work = report["trace"], report["contenders"], report["work"]
    kinds = [act["kind"] for act in trace["acts"] if act["at_s"] > 0]
    announced = sum(1 for act in trace["acts"] if act["kind"] == "lose" and act["notice_s"])
    names = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"# Spot training, {report['date']}, trace {trace['name']}",
        "",
        f"{report['machine']}; {names}",
        "",
        f"{trace['seconds'] / 60:.0f} minutes, at most {trace['most']} raylets, {kinds.count('join')} joins and "
        f"{kinds.count('lose')} losses, {announced} of them announced. {work['samples']} samples an epoch, "
        f"{work['global_batch']} a step, {work['atom']} a forward pass, a checkpoint every {work['save_every']} "
        "steps. All raylets share the cores of this machine: more workers than cores are not faster, so goodput "
        "takes each world size at its own step time. A killed node's connections break at once, which those of a "
        "machine that vanishes do not.",
        "",
        "| | goodput | useful samples | a second | computed | steps | attempts | "
        "useful, s | data | save | lost | restart |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, one in found.items():
        spent, samples = one["spent"], one["samples"]
        cells = [f"{spent['goodput']:.1%}", samples["useful"], f"{samples['useful'] / spent['wall']:.1f}"]
        cells += [samples["computed"], one["steps"], one["attempts"]]
        cells += [f"{spent[part]:.0f}" for part in ("useful", "data", "save", "lost", "restart")]
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    lines += ["", "Useful are different (sample, epoch) in steps that a checkpoint held at the end.", ""]
    for name, one in found.items():
        samples = one["samples"]
        usual = ", ".join(f"{seconds:.2f} at W={size}" for size, seconds in sorted(one["usual"].items()))
        told = f"in {samples['epochs']} finished epochs {samples['lost']} lost, {samples['doubled']} doubled"
        told += f"; an undisturbed step takes {usual} s; load average before it {one['load']:.1f}"
        told += f"; {one['drivers']} drivers" if one["drivers"] > 1 else ""
        lines.append(f"- {name}: {told}")
    if "audit" in found.get("ours", {}):
        lines.append(f"- audit of ours: {found['ours']['audit']}")
    lines += ratios(found)
    lines += [
        "",
        "## Recovery, s",
        "",
        "To the first step of the new group, and to the first one that is new: from a",
    ]
    lines += ["loss, or from the last step before an announced loss or a join. p50 / p95 (number).", ""]
    lines += [
        "| | loss | announced loss | join | beyond: loss | announced loss | join |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, one in found.items():
        cells = [
            _quantiles(one[what][kind])
            for what in ("recovery", "beyond")
            for kind in ("loss", "announced loss", "join")
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "## Where recoveries go, s", ""]
    lines += [
        "| | change | W | first | " + " | ".join(_PARTS) + " | redone |",
        "|---|---|--:|--:|" + "--:|" * (len(_PARTS) + 1),
    ]
    for name, one in found.items():
        for seam in one["seams"]:
            parts = [f"{seam['parts'][part]:.1f}" if part in seam["parts"] else "" for part in _PARTS]
            cells = [name, seam["kind"], str(seam["world_size"]), f"{seam['first']:.1f}", *parts, str(seam["redone"])]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_PARTS = ("begun", "decided", "ready", "batch", "step")


def ratios(found: dict[str, Any]) -> list[str]:
    """Return how ours compares with each of the others."""
    lines = []
    for name in ("stock", "scratch"):
        if {"ours", name} <= found.keys():
            mine, theirs = found["ours"], found[name]
            useful = mine["samples"]["useful"] / max(1, theirs["samples"]["useful"])
            better = mine["spent"]["goodput"] / max(1e-9, theirs["spent"]["goodput"])
            lines.append(f"- ours / {name}: {useful:.2f} in useful samples, {better:.2f} in goodput")
    return lines


def _quantiles(of: dict[str, float]) -> str:
    return f"{of['p50']:.1f} / {of['p95']:.1f} ({of['num']})" if of["num"] else ""
