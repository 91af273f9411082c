"""Several raylets on one machine, each a node that can come, be told to go, and vanish.

with Lab(tmp) as lab:
    node = lab.join()
    driver = lab.start("jobs/finetune.py", "tiny.finetune", ...)
    lab.kill(node)
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import psutil

ROOT = Path(__file__).resolve().parents[2]

TRAINER = "trainer"
"""A custom resource: one unit of it makes a raylet a node for one worker."""

_QUICK = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
"""The cluster notices a dead node within two seconds, instead of fifteen."""


class Lab:
    """A cluster whose head decodes and whose other nodes train."""

    def __init__(self, folder: Path, *, decoders: int = 2, quick: bool = True, path: tuple[Path, ...] = ()) -> None:
        """A `quick` one notices a dead node at once; `path` is searched first, by every process, for modules."""
        self.folder = folder
        self.settings = _QUICK if quick else {}
        self.decoders = decoders
        self.path = path
        self.nodes: list[Any] = []
        self.drivers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        from ray.cluster_utils import Cluster

        path = os.pathsep.join(map(str, [*self.path, ROOT / "platform", ROOT]))
        # Workers keep the environment in which their node was started.
        self._env = {"PYTHONPATH": path, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        os.environ.update(self._env)
        self._temp = f"/tmp/rl-lab-{os.getpid()}-{time.monotonic_ns() % 10**6}"  # socket paths end at 107 characters
        Path("/tmp/ray").mkdir(exist_ok=True)  # where Cluster leaves its address, whatever its own folder
        head = {"num_cpus": self.decoders, "object_store_memory": 400 << 20, "temp_dir": self._temp}
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args=head | {"include_dashboard": False, "_system_config": self.settings},
        )
        return self

    def __exit__(self, *_: object) -> None:
        for driver in self.drivers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
        self.cluster.shutdown()
        subprocess.run(["rm", "-rf", self._temp], check=False)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def join(self) -> Any:
        """Add a node with room for one worker."""
        node = self.cluster.add_node(num_cpus=1, resources={TRAINER: 1}, object_store_memory=200 << 20)
        self.nodes.append(node)
        return node

    def kill(self, node: Any) -> None:
        """Take a node away without notice."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, *, seconds: float) -> None:
        """Tell a node that it is going to be taken away; it stays until somebody kills it."""
        from ray._raylet import GcsClient

        reason_preempted = 2  # DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        deadline = int((time.time() + seconds) * 1000)
        accepted, why = GcsClient(address=self.address).drain_node(node.node_id, reason_preempted, "spot", deadline)
        assert accepted, why

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a program of ours against this cluster; its output goes to LAB/driver-N.log."""
        log = (self.folder / f"driver-{len(self.drivers) + 1}.log").open("wb")
        driver = subprocess.Popen(
            [sys.executable, *words, "--address", self.address],
            cwd=ROOT,
            env=os.environ | self._env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.drivers.append(driver)
        return driver

    def workers(self) -> list[psutil.Process]:
        """Return the processes that train now, on any node."""
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if any("RayTrainWorker" in word for word in process.info["cmdline"] or [])
            and self._temp in _environment(process)
        ]


def _environment(process: psutil.Process) -> str:
    try:
        return " ".join(process.environ().values()) + " ".join(map(str, process.open_files()))
    except psutil.Error:
        return ""
