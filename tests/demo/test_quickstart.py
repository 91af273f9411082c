"""The quickstart as a person runs it, killed on the way. Minutes long: `make test-slow`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayllava.evals.metrics import wilson
from rayllava.place import Place
from rayllava.train.meter import read_metrics

ROOT = Path(__file__).resolve().parents[2]


def start(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "jobs/quickstart.py", "--out", str(out)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "2"})


def kill_when(out: Path, reached: str, steps: int = 0) -> None:
    """Start it, wait until a file is there (with that many steps in it), and kill it without notice."""
    job = start(out)
    deadline = time.monotonic() + 600
    while not (out / reached).exists() or len(read_metrics(Place(str(out / reached)))) < steps:
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    job.send_signal(signal.SIGKILL)
    job.wait()
    time.sleep(5)  # Ray's processes end with their driver


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_kills_on_the_way_leave_a_correct_end(tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    kill_when(out, "phases/pictures.json")
    kill_when(out, "pretrain/metrics.jsonl", steps=30)
    kill_when(out, "finetune/metrics.jsonl", steps=150)
    kill_when(out, "evals/finetune/textvqa/predictions.jsonl")
    assert start(out).wait() == 0
    report = json.loads((out / "report.json").read_text())
    assert [entry["step"] for entry in read_metrics(Place(str(out / "finetune" / "metrics.jsonl")))] == list(
        range(1, 647)
    )
    open_answer, yes_no = report["scores"]["open_answer"], report["scores"]["yes_no"]
    assert yes_no["finetune"] >= 0.93
    assert open_answer["finetune"] >= 0.85 and report["kinds"]["place"]["finetune"] >= 0.90
    for score in (open_answer, yes_no):
        assert abs(score["nf4"] - score["finetune"]) <= 0.03
    above = [wilson(round(s["pretrain"] * 450), 450)[0] > s["chance"] for s in (open_answer, yes_no)]
    assert any(above), "stage 1 is not above chance"
    assert report["proof"]["max_abs_logit_diff"] <= 1e-4
    assert report["served"]["streamed_equals_plain"] and report["served"]["served_equals_offline"]
    assert start(out).wait() == 0, "a finished quickstart runs again and reuses everything"
    assert json.loads((out / "report.json").read_text())["seconds"] == report["seconds"]
