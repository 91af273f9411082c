"""RUN -> RUN/export: the trained model as a Hugging Face LLaVA folder that answers."""

from __future__ import annotations

import logging
import time

import torch

from rayllava import copies
from rayllava.checkpoint.layouts import StoredModel, write
from rayllava.checkpoint.manifest import ModelManifest
from rayllava.families import FAMILIES
from rayllava.model.build import result
from rayllava.place import Place
from rayllava.recipe import ProcessorSpec

log = logging.getLogger(__name__)


def export(run: Place) -> ModelManifest:
    """Write the model that a run trained, in the run's compute type, to RUN/export.

    For a run in a store it is written on this node first, and its manifest put last.
    """
    llava, trained = result(run)
    assert trained.recipe.model is not None
    family = trained.recipe.model.family
    tokenizer_dir = copies.local(run / "tokenizer")
    stored = StoredModel.of(llava, tokenizer_dir, num_own_rows=llava.num_own_rows)
    stored = stored.cast(getattr(torch, trained.recipe.scale.dtype))
    manifest = ModelManifest(
        processor=answering(trained.processor, family),
        family=family,
        source=str(run),
        recipe=trained.recipe.model_dump(mode="json"),
        step=trained.num_steps,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions=trained.versions,
    )
    with run.scratch() as folder:
        manifest = write("hf", folder / "export", stored, manifest)
        (run / "export").take_dir(folder / "export", last="manifest.json")
    return manifest


def answering(processor: ProcessorSpec, family: str) -> ProcessorSpec:
    """Return the processor with which a trained model is asked.

    That is the one it was trained with, but for `plain`, which has no place for a question: a model whose
    projector alone was trained on captions is asked in the template of its untouched language model.
    """
    if processor.template != "plain":
        return processor
    return processor.but(template=FAMILIES[family].template)
