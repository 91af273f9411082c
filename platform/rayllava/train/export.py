"""RUN -> RUN/export: the trained model as a Hugging Face LLaVA folder that answers."""

from __future__ import annotations

import logging

from rayllava.families import FAMILIES
from rayllava.recipe import ProcessorSpec

log = logging.getLogger(__name__)


def answering(processor: ProcessorSpec, family: str) -> ProcessorSpec:
    """Return the processor with which a trained model is asked.

    That is the one it was trained with, but for `plain`, which has no place for a question: a model whose
    projector alone was trained on captions is asked in the template of its untouched language model.
    """
    if processor.template != "plain":
        return processor
    return processor.but(template=FAMILIES[family].template)
