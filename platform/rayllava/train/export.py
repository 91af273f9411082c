"""RUN -> RUN/export: the trained model as a Hugging Face LLaVA folder that answers."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from rayllava.checkpoint.layouts import LAYOUTS, StoredModel
from rayllava.checkpoint.manifest import ModelManifest
from rayllava.families import FAMILIES
from rayllava.model.build import result
from rayllava.place import Place
from rayllava.recipe import ProcessorSpec

log = logging.getLogger(__name__)


def export(run_dir: Path) -> ModelManifest:
    """Write the model that a run trained, in the run's compute type, to RUN/export."""
    llava, run = result(Place(str(run_dir)))
    assert run.recipe.model is not None
    family = run.recipe.model.family
    stored = StoredModel.of(llava, run_dir / "tokenizer").cast(getattr(torch, run.recipe.scale.dtype))
    manifest = ModelManifest(
        processor=answering(run.processor, family),
        family=family,
        source=str(run_dir),
        recipe=run.recipe.model_dump(mode="json"),
        step=run.num_steps,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions=run.versions,
    )
    return LAYOUTS["hf"].write(run_dir / "export", stored, manifest)


def answering(processor: ProcessorSpec, family: str) -> ProcessorSpec:
    """Return the processor with which a trained model is asked.

    That is the one it was trained with, but for `plain`, which has no place for a question: a model whose
    projector alone was trained on captions is asked in the template of its untouched language model.
    """
    if processor.template != "plain":
        return processor
    return processor.but(template=FAMILIES[family].template)
