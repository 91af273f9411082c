"""Worker processes that are ready before they are needed.

Most of a restart is spent on imports: torch, Ray Train, transformers, peft. A raylet starts idle processes ahead of
time for whoever asks, and gives them to the next actor of the same job and runtime environment. Ours import when
they start, while the group before still trains; so the next group finds its processes ready.

group that trains --identity--> Spares --PrestartWorkers--> raylet of each node --> idle process --warm_up--+
                                Spares <------------ the cluster's key-value store <--- "ready" ------------+

They import at a low priority, for the cores are the training group's. Spares are a convenience: where a raylet does
not start any, a restart takes longer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from typing import Any, NamedTuple

import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.experimental import internal_kv

from rayllava import log as log_
from rayllava.recipe import LoRA, TowerLoRA, Tuning

log = logging.getLogger(__name__)

_IMPORTS = "RAYLLAVA_IMPORTS"
_RUN = "RAYLLAVA_RUN"
"""Tells the processes of one driver from those of others on the same cluster."""
_MODULES = ("rayllava.train.loop", "transformers.models.llava.modeling_llava")
_DEEPSPEED = ("deepspeed", "deepspeed.runtime.zero.muon.original_muon")
"""The second, which every optimizer leads to, imports torch's compiler. Not where there are GPUs: the first looks for
them, and a process that has looked no longer heeds which of them Ray gives it."""
_HELPERS = (
    "rayllava.data.steps",
    "rayllava.data.stream",
    "ray.data._internal.iterator.stream_split_iterator",
    "ray.train.v2._internal.execution.checkpoint.sync_actor",
)
_KEEP_S = 24 * 3600
"""How long a raylet keeps an idle process; it ends with its job anyway."""
_LONG_S = 90.0
"""A node whose spares were asked for so long ago is ready for a group without them."""
_NICE = 10
_NAMESPACE = b"rayllava.spares"


def runtime_env(tuning: Tuning, *, driver: str, use_gpu: bool) -> dict[str, Any]:
    """Return the runtime environment of workers that train so: they import what they need as they start."""
    adapted = isinstance(tuning, LoRA) or isinstance(tuning.vision, TowerLoRA)
    modules = (*_MODULES, *["peft"] * adapted, *_DEEPSPEED * (not use_gpu))
    hook = {_IMPORTS: ",".join(modules), _RUN: driver, WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.warm_up"}
    return {"env_vars": hook}


def job_env() -> dict[str, Any]:
    """Return the runtime environment of a training job's other processes: those that deal, decode and synchronize."""
    return {"env_vars": {_IMPORTS: ",".join(_HELPERS), WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.warm_up"}}


def warm_up() -> None:
    """Import what a process will need; Ray calls it in all that start in `runtime_env` or `job_env`."""
    log_.quiet_workers()
    thread = threading.Thread(target=_import_humbly, name="imports")
    thread.start()
    thread.join()
    if run := os.environ.get(_RUN):
        node = ray.get_runtime_context().get_node_id()
        internal_kv._internal_kv_put(f"{run}/{node}/{os.getpid()}", b"", namespace=_NAMESPACE)


def _import_humbly() -> None:
    """Import at a low priority. On Linux that is this thread's and ends with it; a process could not take it back."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    for name in os.environ[_IMPORTS].split(","):
        import_module(name)


class Identity(NamedTuple):
    """What a process must have been started for to be given to a worker of the group."""

    job: str
    """Hexadecimal."""
    env: str
    """Ray's own JSON of the runtime environment."""


def identity() -> Identity:
    """Return this worker's; called inside one."""
    context = ray.get_runtime_context()
    return Identity(context.get_job_id(), context.get_runtime_env_string())


class Spares:
    """Keeps processes of one identity ready on nodes."""

    def __init__(self, driver: str) -> None:
        self.driver = driver
        self.identity: Identity | None = None
        """Until it is known, nothing is kept."""
        self._there: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()
        self._since: dict[str, float] = {}

    def taken(self, nodes: Iterable[str]) -> None:
        """Note that a new group has taken processes on these nodes, one each time a node is named."""
        self._there.subtract(nodes)
        self._there = +self._there

    def keep(self, node: str, address: str, count: int) -> None:
        """Have `count` processes ready on a node whose raylet listens at `address`."""
        missing = count - self._there[node]
        if self.identity is None or missing <= 0:
            return
        self._there[node] = count
        self._asked[node] += missing
        self._since.setdefault(node, time.monotonic())
        try:
            _ask(address, self.identity, missing)
        except Exception as error:  # whatever a raylet of another mind says; nothing depends on it
            log.warning("no spare processes on %s: %s", node[:8], (str(error).splitlines() or [""])[0])

    def ready(self, node: str) -> bool:
        """Say whether a node without workers has its spares; one that joins while a group trains is let in then."""
        since = self._since.get(node)
        if since is None:
            return False
        there = internal_kv._internal_kv_list(f"{self.driver}/{node}/", namespace=_NAMESPACE)
        return len(there) >= self._asked[node] or time.monotonic() - since > _LONG_S


def _ask(address: str, identity: Identity, count: int) -> None:
    from ray.core.generated.common_pb2 import Language  # type: ignore[attr-defined]
    from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest  # type: ignore[attr-defined]
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

    request = PrestartWorkersRequest(
        language=Language.PYTHON,
        job_id=bytes.fromhex(identity.job),
        keep_alive_duration_secs=_KEEP_S,
        num_workers=count,
    )
    request.runtime_env_info.serialized_runtime_env = identity.env
    with init_grpc_channel(address) as channel:
        NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=2.0)
