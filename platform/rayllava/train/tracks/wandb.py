"""Weights & Biases. Account and address come from where its own tools look, the project is else `rayllava`."""

from __future__ import annotations

import html
import os
import tempfile
from typing import Any

from rayllava.checkpoint.run import RunManifest
from rayllava.place import Place
from rayllava.train.tracks import Tracker


class _Session:
    """A run of W&B. Its own count of steps only grows, so ours is an axis of its own."""

    rewinds = False

    def __init__(self, folder: Place, manifest: RunManifest, id_: str) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rayllava"),
            name=Place(manifest.recipe.out).name,
            id=id_ or None,
            resume="allow",
            config=manifest.recipe.model_dump(mode="json"),
            dir=tempfile.gettempdir() if folder.remote else str(folder.local.parent),  # it adds a folder `wandb`
        )
        self.id: str = self._run.id
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def back(self, step: int) -> None:
        raise AssertionError("W&B cannot go back")

    def scalars(self, step: int, values: dict[str, float], *, at: float) -> None:
        self._run.log({"step": step} | values)

    def text(self, step: int, markdown: str, *, at: float) -> None:
        import wandb

        self._run.log({"step": step, "validation/answers": wandb.Html(f"<pre>{html.escape(markdown)}</pre>")})

    def flush(self) -> None:
        """W&B sends by itself."""

    def close(self) -> None:
        self._run.finish()


def _open(folder: Place, manifest: RunManifest, id_: str) -> _Session:
    folder.make_dir()
    return _Session(folder, manifest, id_)


PLUG = Tracker(_open, package="wandb", extra="wandb")
