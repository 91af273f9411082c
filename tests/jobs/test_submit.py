"""`ray job submit` is a first-class way in."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayllava.recipe import ModelSpec
from tests.tiny import write_dialogues

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A head node on this machine; yields the address of its job API."""
    dashboard = free_port()
    temp_dir = Path("/tmp") / f"rl-head-{os.getpid()}"  # short: unix socket paths end at 107 characters
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={free_port()}", "--num-cpus=6"]
    command += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1"]
    # Without a port of its own, the agent that runs jobs would meet that of another Ray on this machine.
    command += [f"--temp-dir={temp_dir}", f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats"]
    env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
    log = (tmp_path_factory.mktemp("head") / "log.txt").open("w")
    node = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_for(f"{address}/api/version", node)
        yield address
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        try:
            node.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        subprocess.run(["rm", "-rf", str(temp_dir)], check=False)


def _wait_for(url: str, node: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert node.poll() is None, "the head node ended"
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{url} does not answer")


def submit(head: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "ray"), "job", "submit", "--address", head, "--working-dir", "."]
    command += ["--runtime-env", "cluster/runtime_env.yaml", "--", *words]
    env = os.environ | {"RAY_AUTH_MODE": "disabled"}
    for _ in range(10):  # the head answers a little before the agent that runs jobs does
        job = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
        if "No available agent" not in job.stderr:
            break
        time.sleep(1)
    return job


def test_a_finetuning_job_runs_to_its_end(head: str, parts: ModelSpec, tmp_path: Path) -> None:
    dialogues, shards, out = write_dialogues(tmp_path, num=24), tmp_path / "shards", tmp_path / "run"
    images = f"images={tmp_path / 'images'}"
    job = submit(head, "python", "jobs/shard.py", "llava", str(dialogues), str(shards), images)
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-3000:]
    words = ["python", "jobs/finetune.py", "tiny.finetune", f"data={shards}", f"out={out}"]
    words += [f"model.llm={parts.llm}", f"model.vision={parts.vision}", "model.family=vicuna"]
    words += ["data.global_batch=8", "data.atom=4"]
    job = submit(head, *words)
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-3000:]
    assert "succeeded" in (job.stdout + job.stderr)
    assert json.loads((out / "manifest.json").read_text())["finished"] is True
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    assert (out / "export" / "config.json").exists()


def test_a_wrong_field_fails_the_job_with_its_cause(head: str) -> None:
    job = submit(head, "python", "jobs/finetune.py", "tiny.finetune", "optim.lrr=1")
    assert job.returncode != 0
    said = [line for line in (job.stdout + job.stderr).splitlines() if "error:" in line]
    assert any("unknown field optim.lrr; did you mean lr?" in line for line in said), job.stdout
    assert "Traceback" not in job.stdout
