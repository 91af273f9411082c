"""Killed at any moment, a run keeps a checkpoint that loads, and nothing wrong is ever taken for right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("num_kills", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_whatever_kills_a_save_a_whole_checkpoint_is_found(num_kills: int, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.checkpoint.torn", str(tmp_path / "runs"), str(num_kills), "1"]
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-3000:]
    counts = json.loads(ended.stdout)
    assert counts["kills"] == num_kills
    # Of little use if nothing had been saved, or nothing had been under way.
    assert counts["commits"] >= num_kills and counts["flips"] >= num_kills / 20 and counts["errors"] >= 1
