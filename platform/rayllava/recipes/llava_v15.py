"""LLaVA-v1.5, 7B and 13B: the numbers of haotian-liu/LLaVA's scripts/v1_5."""

from __future__ import annotations

from rayllava.recipe import DataSpec, Full, ModelSpec, OptimSpec, Projector, PromptSpec, Recipe, ScaleSpec

_MODEL_7B = ModelSpec(llm="lmsys/vicuna-7b-v1.5", vision="openai/clip-vit-large-patch14-336", family="vicuna")
_MODEL_13B = _MODEL_7B.but(llm="lmsys/vicuna-13b-v1.5")


def pretrain_7b() -> Recipe:
    """Stage 1 on LLaVA-Pretrain 558K (pretrain.sh): 2181 steps."""
    return Recipe(
        model=_MODEL_7B,
        prompt=PromptSpec(template="plain", aspect="crop"),
        tuning=Projector(),
        data=DataSpec(global_batch=256, atom=32),
        optim=OptimSpec(lr=1e-3),
        scale=ScaleSpec(workers="8", zero=2),
    )


def finetune_7b() -> Recipe:
    """Stage 2 on LLaVA-Mix 665K (finetune.sh): 5198 steps; needs init_from, a run of pretrain_7b."""
    return pretrain_7b().but(
        model=None,
        prompt=PromptSpec(template="vicuna_v1"),
        tuning=Full(),
        data=DataSpec(global_batch=128, atom=16),
        optim=OptimSpec(lr=2e-5),
        scale=ScaleSpec(workers="8", zero=3),
    )


def pretrain_13b() -> Recipe:
    return pretrain_7b().but(model=_MODEL_13B)


def finetune_13b() -> Recipe:
    """Needs init_from, a run of pretrain_13b."""
    return finetune_7b()
