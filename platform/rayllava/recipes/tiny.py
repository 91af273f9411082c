"""The quickstart's recipes: the shape of LLaVA-v1.5's two stages, at a size that two CPU cores train in minutes."""

from __future__ import annotations

from rayllava.recipe import (
    DataSpec,
    Full,
    ModelSpec,
    OptimSpec,
    Projector,
    PromptSpec,
    Recipe,
    SaveSpec,
    ScaleSpec,
)

_SCALE = ScaleSpec(workers="2", zero=2, device="cpu", dtype="float32", checkpointing=False, threads=1)


def pretrain() -> Recipe:
    """Stage 1: the projector learns to caption."""
    return Recipe(
        model=ModelSpec(llm="runs/quickstart/parts/llm", vision="runs/quickstart/parts/vision", family="vicuna"),
        prompt=PromptSpec(template="plain", max_length=256),
        tuning=Projector(),
        data=DataSpec(global_batch=32, atom=16),
        optim=OptimSpec(lr=2e-3),
        scale=_SCALE,
        save=SaveSpec(every=100),
    )


def finetune() -> Recipe:
    """Stage 2: projector and language model learn to answer."""
    return pretrain().but(
        model=None,
        after="tiny.pretrain",
        prompt=PromptSpec(template="vicuna_v1", max_length=512),
        tuning=Full(),
        data=DataSpec(global_batch=16, atom=8),
        optim=OptimSpec(lr=1.5e-3),
        scale=_SCALE.but(zero=3),
    )
