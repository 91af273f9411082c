"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil


def machine() -> str:
    """Return processor, cores, memory and Python version in a line."""
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    memory = psutil.virtual_memory().total / 2**30
    return f"{model.partition(': ')[2]}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"
