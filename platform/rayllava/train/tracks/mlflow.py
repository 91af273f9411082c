"""MLflow. The server comes from where its own tools look (MLFLOW_TRACKING_URI), the experiment is else `rayllava`."""

from __future__ import annotations

import os
from typing import Any

from rayllava.checkpoint.run import RunManifest
from rayllava.place import Place
from rayllava.train.tracks import Tracker

_MOST = 1000
"""Numbers that a server takes at once."""


class _Session:
    """A run of MLflow, through its client: the fluent API would be one for the whole process."""

    rewinds = False

    def __init__(self, manifest: RunManifest, id_: str) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        self._held: list[Any] = []
        self.id: str = id_
        if id_:
            self._client.update_run(id_, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rayllava")
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        made = self._client.create_run(experiment, run_name=Place(manifest.recipe.out).name)
        self.id = made.info.run_id
        self._client.log_dict(self.id, manifest.recipe.model_dump(mode="json"), "recipe.json")

    def back(self, step: int) -> None:
        raise AssertionError("MLflow cannot go back")

    def scalars(self, step: int, values: dict[str, float], *, at: float) -> None:
        from mlflow.entities import Metric

        self._held += [Metric(name, value, int(at * 1000), step) for name, value in values.items()]

    def text(self, step: int, markdown: str, *, at: float) -> None:
        self._client.log_text(self.id, markdown, f"answers/step-{step:06d}.md")

    def flush(self) -> None:
        for start in range(0, len(self._held), _MOST):
            self._client.log_batch(self.id, metrics=self._held[start : start + _MOST])
        self._held.clear()

    def close(self) -> None:
        self.flush()
        self._client.set_terminated(self.id)


def _open(folder: Place, manifest: RunManifest, id_: str) -> _Session:
    return _Session(manifest, id_)


PLUG = Tracker(_open, package="mlflow", extra="mlflow")
