"""Ranks of a process group without Ray: every rank runs one function and returns a value."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(function: str, world_size: int, argument: Any, *, seconds: float = 300) -> list[Any]:
    """Run `module:function(argument)` on `world_size` gloo ranks and return their JSON results by rank."""
    codes, outputs = start_ranks(function, world_size, argument, seconds=seconds)
    assert codes == [0] * world_size, f"ranks ended with {codes}"
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def start_ranks(
    function: str, world_size: int, argument: Any, *, errors: bool = False, seconds: float = 300
) -> tuple[list[int], list[str]]:
    """Run a function as `run_ranks` does; return exit codes and what the ranks printed, on stderr with `errors`."""
    processes = begin_ranks(function, world_size, argument, errors=errors)
    outputs = [process.communicate(timeout=seconds)[errors] for process in processes]
    return [process.returncode for process in processes], outputs


def begin_ranks(
    function: str, world_size: int, argument: Any, *, errors: bool = False
) -> list[subprocess.Popen[str]]:
    """Start the ranks of `start_ranks` and return their processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    processes = []
    for rank in range(world_size):
        env = os.environ | {
            "PYTHONPATH": path,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        command = [sys.executable, "-m", "tests.train.ranks", function, json.dumps(argument)]
        pipes = {"stderr" if errors else "stdout": subprocess.PIPE}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes))
    return processes


def main() -> None:
    import torch

    module, _, name = sys.argv[1].partition(":")
    torch.distributed.init_process_group("gloo")
    function = getattr(__import__(module, fromlist=[name]), name)
    result = function(json.loads(sys.argv[2]))
    torch.distributed.barrier()
    print(json.dumps(result), flush=True)
    os._exit(0)  # what DeepSpeed compiled leaves threads behind that now and then abort a clean exit


if __name__ == "__main__":
    main()
