"""Worker processes that are ready before they are needed.

Most of a restart is spent on imports: torch, Ray Train, transformers, peft. A raylet starts idle processes ahead of
time for whoever asks, and gives them to the next actor of the same job and runtime environment. Ours import when
they start, while the group before still trains; so the next group finds its processes ready.

group that trains --identity--> Spares --PrestartWorkers--> raylet of each node --> idle process, `warm_up` done

Spares are a convenience: where a raylet does not start any, a restart takes longer.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from typing import Any, NamedTuple

import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

from rayllava import log as log_
from rayllava.recipe import LoRA, TowerLoRA, Tuning

log = logging.getLogger(__name__)

_IMPORTS = "RAYLLAVA_IMPORTS"
_MODULES = ("rayllava.train.loop", "transformers.models.llava.modeling_llava")
_KEEP_S = 24 * 3600
"""How long a raylet keeps an idle process; it ends with its job anyway."""
_WARM_S = 15.0
"""A node whose spares were asked for so long ago is ready for a group."""


def runtime_env(tuning: Tuning) -> dict[str, Any]:
    """Return the runtime environment of workers that train so: they import what they need as they start."""
    adapted = isinstance(tuning, LoRA) or isinstance(tuning.vision, TowerLoRA)
    modules = (*_MODULES, "peft") if adapted else _MODULES
    return {"env_vars": {_IMPORTS: ",".join(modules), WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.warm_up"}}


def warm_up() -> None:
    """Import what a worker will need; Ray calls it in every process that starts in `runtime_env`."""
    log_.quiet_workers()
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
    """Keeps a process ready on every node for every worker that a group may have there."""

    def __init__(self) -> None:
        self.identity: Identity | None = None
        """Known once a group has trained; the same for every group of a run."""
        self._there: Counter[str] = Counter()
        self._since: dict[str, float] = {}

    def taken(self, nodes: Iterable[str]) -> None:
        """Note that a new group has workers on these nodes, one each time a node is named."""
        self._there.subtract(nodes)
        self._there = +self._there

    def keep(self, node: str, address: str, count: int) -> None:
        """Have `count` processes ready on a node whose raylet listens at `address`."""
        missing = count - self._there[node]
        if self.identity is None or missing <= 0:
            return
        self._there[node] = count
        self._since.setdefault(node, time.monotonic())
        try:
            _ask(address, self.identity, missing)
        except Exception as error:  # whatever a raylet of another mind says; nothing depends on it
            log.warning("no spare processes on %s: %s", node[:8], (str(error).splitlines() or [""])[0])

    def ready(self, node: str) -> bool:
        """Say whether a node had time to prepare; one that joins while a group trains is let in when it has."""
        since = self._since.get(node)
        return since is not None and time.monotonic() - since > _WARM_S


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
