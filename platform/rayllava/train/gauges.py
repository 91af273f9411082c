"""A run's numbers among Ray's metrics, for Prometheus and Grafana: ray_rayllava_step{run="..."}, and so on."""

from __future__ import annotations

from collections.abc import Mapping

GAUGES = {
    "step": "Optimizer steps done",
    "loss": "Training loss a target token",
    "validation_loss": "Loss a target token on samples that do not train",
    "tokens_per_second": "Positions that are not padding, all workers together",
    "mfu": "Model FLOP/s as a share of the hardware's",
    "workers": "Ranks of the worker group",
    "goodput": "Share of the time with enough nodes that went into steps that count",
    "useful_seconds": "Time of steps that count",
    "data_seconds": "Time spent waiting for data",
    "save_seconds": "Time held up by checkpoints",
    "watch_seconds": "Time spent on validation and sample answers",
    "lost_seconds": "Time of steps that were done again",
    "restart_seconds": "Time spent starting worker groups",
    "waiting_seconds": "Time without enough nodes",
}
"""Name, behind rayllava_, and meaning of each."""


class Gauges:
    """The gauges of one run, set by its driver; they are gone when it ends."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._gauges = {
            name: Gauge(f"rayllava_{name}", description=told, tag_keys=("run",)) for name, told in GAUGES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def set(self, values: Mapping[str, float | None]) -> None:
        """Set what is known."""
        for name, value in values.items():
            if value is not None:
                self._gauges[name].set(value)
