"""What every benchmark tells beside its figures, and where these are kept."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent


def machine() -> str:
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    memory = psutil.virtual_memory().total / 2**30
    return f"{model.partition(': ')[2]}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}


def keep(name: str, report: dict[str, Any], text: str) -> None:
    """Write the figures and what `text` made of them to benchmarks/results."""
    out = HERE / "results" / name
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    out.with_suffix(".md").write_text(text + "\n")


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table, its first column to the left and the others to the right."""
    marks = ["---"] + ["--:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (head, marks, *rows)]


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)
