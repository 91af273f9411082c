"""A worker group that follows the nodes of a cluster: Ray Train's trainer, with policies of our own.

    nodes --Capacity--> how many workers, and when to change that
    failed group --Failures--> start again, or stop and say why

Ray's elastic policy reads a reservation that is made anew every 20 s and counts nodes that are about to go; it
replaces a group without telling it. This one looks at the nodes themselves, leaves out those that are draining or
do not answer, and has a healthy group save and wait before it is replaced, so that a planned change redoes no step.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from rayllava import log as log_
from rayllava.checkpoint import run as runs
from rayllava.place import Place
from rayllava.recipe import ScaleSpec
from rayllava.train import signals
from rayllava.train.warm import Warm

log = logging.getLogger(__name__)

_SETTLE_S = 2.0
"""How long the first group waits for a node that is just coming when it would be below its largest size."""
_SAVE_S = 120.0
"""Longest wait for a save before a planned change."""
_RESTART_S = 10.0
"""What a restart is taken to cost when nothing else is known; growing must win twice that."""
_MARGIN_S = 5.0
"""Before the deadline of a draining node that cannot be replaced, its group saves and waits."""


_WITHOUT = (DatasetsCallback, PlacementGroupCleanerCallback)
"""What we leave out of Ray Train. Rows come from rayllava.train.feed, and what a dead controller leaves ends with its
job. The second looks for its controller every second, in the newest cluster of its host where no variable names one,
and takes the workers' places away when it is not there."""


class ElasticTrainer(TorchTrainer):
    """Ray's TorchTrainer under our policies."""

    def __init__(self, *args: Any, scale: ScaleSpec, run: Place, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scale = scale
        self._run = run

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        # The stubs show the configurations of Train's first version.
        config = cast(ScalingConfig, self.scaling_config)
        worker_env = self.run_config.worker_runtime_env  # type: ignore[attr-defined]
        kwargs["scaling_policy"] = Capacity(config, self._scale, self._run, worker_env)
        kwargs["failure_policy"] = Failures(cast(FailureConfig, self.run_config.failure_config), self._run)
        # The process group is set up by one of Ray Train's, and what that leaves when it breaks is to be known.
        kwargs["callbacks"] = [_Leftovers(), *(one for one in kwargs["callbacks"] if not isinstance(one, _WITHOUT))]
        return super()._initialize_and_run_controller(**kwargs)  # type: ignore[misc]


class _Leftovers(WorkerGroupCallback):
    """Ends a group that broke while it started, before the next one starts.

    Ray Train forgets such a group once it has workers, and those that wait for a lost one would keep their places.
    """

    def __init__(self) -> None:
        self._group: Any = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        if self._group is not None and self._group.has_started():
            log.info("ending the workers of a group that broke while it started")
            self._group._worker_group_state.shutdown()
        self._group = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._group = worker_group


class NoCapacity(ValueError):
    """The cluster did not offer the fewest workers of a run in time."""


class Capacity(ElasticScalingPolicy):
    """Between `scale.workers`' two numbers, as many workers as the nodes that will stay have room for."""

    def __init__(self, scaling_config: ScalingConfig, scale: ScaleSpec, run: Place, warm: dict[str, Any]) -> None:
        """`warm` is the runtime environment of workers, see rayllava.train.warm."""
        super().__init__(scaling_config)
        self.scale = scale
        self.run = run
        self._workers: list[Any] = []
        self._idle_since: float | None = None
        self._said = 0.0
        self._short_since: float | None = None
        self._held_for: set[str] = set()
        self._warm = Warm(warm, None)
        self._began = False

    def after_controller_start(self, train_run_context: Any) -> None:
        log_.start()  # the controller is a process of its own
        super().after_controller_start(train_run_context)

    # -- without a group ----------------------------------------------------------------------------------

    def make_decision_for_non_running_worker_group(self) -> NoopDecision | ResizeDecision:
        self._maybe_send_resource_request()  # the cluster's autoscaler goes on trying for the largest group
        self._workers = []
        now = time.monotonic()
        self._idle_since = self._idle_since or now
        count = self._fit(sum(one.workers for one in self._room()))
        idle = now - self._idle_since
        if count < self.scale.min_workers:
            self._short_since = self._short_since or time.time()
            self._wait(count, idle)
            return NoopDecision()
        if self._short_since:
            self._note_wait(self._short_since, time.time())
            self._short_since = None
        if count < self.scale.max_workers and idle < _SETTLE_S and not self._began:
            time.sleep(0.2)
            return NoopDecision()
        self._idle_since = None
        log.info("starting a group of %d workers after %.1f s without one", count, idle)
        return self._get_resize_decision(count)

    def _wait(self, count: int, idle: float) -> None:
        least, limit = self.scale.min_workers, self.scale.wait_s
        if idle > limit:
            raise NoCapacity(
                f"scale.workers={self.scale.workers}: the cluster had room for {count} of at least {least} workers "
                f"for {limit:.0f} s; add nodes, lower it, or raise scale.wait_s; the same command continues"
            )
        if time.monotonic() - self._said > 30:
            self._said = time.monotonic()
            log.info(
                "room for %d of at least %d workers; waiting for nodes, %.0f of %.0f s", count, least, idle, limit
            )
        time.sleep(0.2)

    def _note_wait(self, begin: float, end: float) -> None:
        """Leave word of a time without enough nodes, for the account of the run's time (rayllava.train.goodput)."""
        content = json.dumps({"from": begin, "to": end}) + "\n"
        (self.run / "waits" / f"{begin:.3f}.json").write_bytes(content.encode())

    # -- beside a healthy group -----------------------------------------------------------------------------

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> NoopDecision | ResizeDecision:
        self._maybe_send_resource_request()
        self._workers = worker_group_state.workers
        self._began = True
        self._idle_since = None
        current = worker_group_state.num_workers
        going = draining()
        ours = {worker.metadata.node_id for worker in self._workers}
        there = self._room()
        self._warm.prepare(one.id for one in there if one.workers)
        count = self._fit(sum(one.workers for one in there if one.id in ours or self._warm.ready(one.id)))
        leaving = {node: deadline for node, deadline in going.items() if node in ours}
        if leaving:
            if count >= self.scale.min_workers:
                log.info("%d nodes of the group are going; %d -> %d workers", len(leaving), current, count)
                return self._get_resize_decision(count)
            self._save_at_the_last_moment(leaving)
            return NoopDecision()
        age = time.monotonic() - worker_group_state.start_time
        if count <= current or age < self.scale.resize_after_s or not self._pays(current, count):
            return NoopDecision()
        log.info("room for %d workers; %d -> %d workers", count, current, count)
        return self._get_resize_decision(count)

    def before_controller_execute_resize_decision(self, resize_decision: ResizeDecision) -> None:
        """Have the group save and wait. Ray Train calls this while it is alive and kills it right afterwards."""
        if not self._workers:
            return
        ends = time.monotonic() + _SAVE_S
        try:
            ray.get(self._workers[0].execute_async(signals.ask), timeout=_SAVE_S)
            while not self._look().held:
                if time.monotonic() > ends:
                    log.warning("no save within %.0f s; what came after the last checkpoint will be redone", _SAVE_S)
                    return
                time.sleep(0.1)
        except (ray.exceptions.RayError, TimeoutError) as error:
            log.warning("the group could not save before its replacement: %s", str(error).splitlines()[0])
        self._workers = []

    def _look(self) -> signals.Progress:
        return ray.get(self._workers[0].execute_async(signals.look), timeout=10)

    def _pays(self, current: int, count: int) -> bool:
        """Say whether the rest of the run gains more by growing than a restart costs twice."""
        try:
            at = self._look()
        except (ray.exceptions.RayError, TimeoutError):
            return False
        if not at.step_seconds:
            return False
        return (at.num_steps - at.step) * at.step_seconds * (1 - current / count) > 2 * _RESTART_S

    def _save_at_the_last_moment(self, leaving: dict[str, int]) -> None:
        """Let a group that nothing can replace work until shortly before its first node goes, then save."""
        ends = min((ms / 1000 for ms in leaving.values() if ms), default=time.time() + _MARGIN_S)
        if time.time() > ends - _MARGIN_S and not leaving.keys() <= self._held_for:
            self._held_for |= leaving.keys()
            self._workers[0].execute_async(signals.ask)

    def _room(self) -> list[Node]:
        return nodes(self.scaling_config._resources_per_worker_not_none)

    def _fit(self, count: int) -> int:
        return min(count, self.scale.max_workers)


class Failures(FailurePolicy):
    """Lost workers are replaced for ever; what a worker did wrong itself ends the run."""

    def __init__(
        self, failure_config: FailureConfig, run: Place, nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
    ) -> None:
        super().__init__(failure_config)
        self.run = run
        self.nodes = nodes
        self._broken = 0
        self._cursor = 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if isinstance(training_failed_error, ControllerError):
            retry = isinstance(training_failed_error.controller_failure, _STARTS)
            return FailureDecision.RETRY if retry else FailureDecision.RAISE
        assert isinstance(training_failed_error, WorkerGroupError)
        failures = training_failed_error.worker_failures
        for rank, error in failures.items():
            log.warning("rank %d: %s: %s", rank, type(error).__name__, (str(error).splitlines() or [""])[0])
        if any(isinstance(error, _MISTAKES) for error in failures.values()):
            return FailureDecision.RAISE
        # The others see their connections break before the cluster knows of a dead node.
        if any(_lost(error) for error in failures.values()) or not all(map(_answers, _alive(self.nodes()))):
            self._broken = 0
            return FailureDecision.RETRY
        # A collective that broke without a dead worker, say.
        attempt = runs.newest_attempt(self.run)
        cursor = runs.read_decision(self.run, attempt).cursor if attempt else 0
        self._broken = self._broken + 1 if cursor == self._cursor else 1
        self._cursor = cursor
        return FailureDecision.RETRY if self._broken <= _TRIES else FailureDecision.RAISE


_TRIES = 3
"""Failures from the same checkpoint on, without a dead worker, before the run ends."""

_STARTS = (WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError, ray.exceptions.RayActorError)
"""What a node that goes while a group starts leads to."""

_MISTAKES = (ValueError, LookupError, AssertionError, TypeError, NotImplementedError, MemoryError)
"""What happens again however often it is tried."""


def _lost(error: Exception) -> bool:
    """Say whether an error is a worker's death."""
    inner = getattr(error, "health_check_failure", error)
    return isinstance(inner, ray.exceptions.RayActorError)


def draining() -> dict[str, int]:
    """Return the nodes that were told to go: {node id: deadline in ms since 1970, 0 when unknown}."""
    return dict(ray._private.state.state.get_draining_nodes() or {})


class Node(NamedTuple):
    """A node that stays."""

    id: str
    workers: int
    """How many it could hold, were it empty."""


def nodes(resources: dict[str, float]) -> list[Node]:
    """Return the nodes that stay, and for how many workers of these resources each would have room."""
    going = draining()
    found = []
    for node in _alive(ray.nodes()):
        if node["NodeID"] not in going and _answers(node):
            fits = [node["Resources"].get(name, 0.0) // need for name, need in resources.items() if need > 0]
            found.append(Node(node["NodeID"], int(min(fits))))
    return found


def answering() -> list[str]:
    """Return the ids of the nodes that are there and answer, whatever they are for."""
    return [node["NodeID"] for node in _alive(ray.nodes()) if _answers(node)]


def _alive(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the nodes that the cluster believes to be there."""
    return [node for node in nodes if node["Alive"]]


def _answers(node: dict[str, Any]) -> bool:
    """Say whether a node's raylet listens. The cluster's own view lags behind a dead one by many seconds."""
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=1.0):
            return True
    except OSError:
        return False
