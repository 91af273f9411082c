"""Nodes that are ready for a training group: a worker there is a fork of a process that has imported everything.

Most of a restart is imports: torch, Ray Train, transformers, peft, 6 s of CPU for each worker. With rayllava.forked a
node does them once, while the group before still trains; a node that joins is let in when it has.

    Warm.prepare([node, ...]) --a task that does nothing--> node: its server starts --> Warm.ready(node)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

import ray
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayllava import forked
from rayllava.recipe import LoRA, TowerLoRA, Tuning

_WORKER = (
    "ray.train.v2._internal.execution.worker_group.worker",
    "rayllava.train.loop",
    "rayllava.data.stream",
    "transformers.models.llava.modeling_llava",
)
_DEEPSPEED = ("deepspeed", "deepspeed.runtime.zero.muon.original_muon")
"""The second, which every optimizer leads to, imports torch's compiler. Not where there are GPUs: like peft, through
bitsandbytes, the first looks for them, and a process that has looked cannot be forked for their use."""
_HELPER = (
    "rayllava.data.steps",
    "rayllava.data.stream",
    "ray.data._internal.iterator.stream_split_iterator",
    "ray.train.v2._internal.execution.controller.controller",
    "ray.train.v2._internal.execution.checkpoint.sync_actor",
)
_OWN = {"py_executable", "pip", "uv", "conda", "container", "image_uri"}
"""Fields of a job's runtime environment that choose its interpreter themselves."""


def worker_env(tuning: Tuning, *, use_gpu: bool) -> dict[str, Any]:
    """Return the runtime environment of workers that train so."""
    adapted = isinstance(tuning, LoRA) or isinstance(tuning.vision, TowerLoRA)
    return _env(_WORKER if use_gpu else (*_WORKER, *_DEEPSPEED, *["peft"] * adapted))


def job_env() -> dict[str, Any]:
    """Return the runtime environment of a training job's other processes: those that deal, decode and synchronize."""
    return _env(_HELPER)


def _env(modules: tuple[str, ...]) -> dict[str, Any]:
    env = {"env_vars": {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: "rayllava.log.quiet_workers"}}
    job = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR) or "{}")
    if _OWN & (job.get("runtime_env") or {}).keys():
        return env
    forks = forked.runtime_env(modules)
    return forks | {"env_vars": forks["env_vars"] | env["env_vars"]}


class Warm:
    """Keeps nodes ready for processes of some runtime environments; None is the one of whoever asks."""

    def __init__(self, *envs: dict[str, Any] | None) -> None:
        self.envs = envs
        self._asked: dict[str, list[Any]] = {}

    def prepare(self, nodes: Iterable[str]) -> None:
        """Have nodes import, those that were not asked to before."""
        for node in nodes:
            if node not in self._asked:
                self._asked[node] = [_nothing_on(node, env) for env in self.envs]

    def ready(self, node: str) -> bool:
        """Say whether a node has imported, or cannot."""
        asked = self._asked.get(node)
        if asked is None:
            return False
        done, _ = ray.wait(asked, num_returns=len(asked), timeout=0)
        return len(done) == len(asked)


def _nothing_on(node: str, env: dict[str, Any] | None) -> Any:
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
    return ray.remote(_nothing).options(**options, **({"runtime_env": env} if env else {})).remote()


def _nothing() -> None:
    pass
