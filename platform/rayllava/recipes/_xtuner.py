"""What XTuner's LLaVA configs have in common, whatever their language model.

- `prompt.max_length`: XTuner counts a picture as one id and cuts at 2048 - 576 or 4096 - 576 ids; here a picture
  counts as its 576 positions, so the same cut stands at 2047 or 4095. A sample without a picture may be longer here.
- The schedule moves with every micro-step, and an incomplete last step is filled from the epoch's beginning.
- Gradients are clipped at norm 1, and one rate holds for everything that trains.
- Its LoRA reaches every linear layer but those named `lm_head` or `output_layer`, and so InternLM2's head, called
  `output`, as well; here no head is adapted.
- Its seed is drawn anew unless the command says one, as those for Llama 3 and Phi-3 do; here it is 42.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from rayllava.recipe import (
    DataSpec,
    Full,
    ModelSpec,
    OptimSpec,
    Projector,
    PromptSpec,
    QLoRA,
    Recipe,
    ScaleSpec,
    TowerLoRA,
)
from rayllava.recipes._origin import name_of

CLIP = "openai/clip-vit-large-patch14-336"

LONG = 4095
"""`prompt.max_length` of the ShareGPT4V and InternVL-SFT configs."""


def pretrain(model: ModelSpec, *, template: str, quant: Literal["none", "nf4"]) -> Recipe:
    """Stage 1: the projector learns from steps of 256 captions, asked for in the chat template."""
    return Recipe(
        model=model,
        prompt=PromptSpec(template=template, aspect="crop", max_length=2047),
        tuning=Projector(quant=quant),
        data=DataSpec(global_batch=256, atom=32, tail="repeat"),
        optim=OptimSpec(lr=1e-3, schedule="mmengine", clip=1.0),
        scale=ScaleSpec(workers="8", zero=2),
    )


def sharegpt4v(first: Recipe) -> Recipe:
    """Stage 1 on ShareGPT4V's long captions."""
    return cut(first, per_device=16, accumulation=2).but(prompt=first.prompt.but(max_length=LONG))


def finetune(after: Callable[[], Recipe]) -> Recipe:
    """Stage 2: everything but the tower learns from steps of 128 dialogues of like length."""
    first = after()
    return first.but(
        model=None,
        after=name_of(after),
        prompt=first.prompt.but(aspect="pad"),
        tuning=Full(),
        data=first.data.but(global_batch=128, atom=16, group="length"),
        optim=first.optim.but(lr=2e-5, micro_steps=1),
    )


def qlora(after: Callable[[], Recipe]) -> Recipe:
    """Stage 2 with adapters alone, on an NF4 language model and on the tower."""
    full = finetune(after)
    return full.but(
        tuning=QLoRA(r=512, alpha=256, vision=TowerLoRA(r=64, alpha=16)),
        optim=full.optim.but(lr=2e-4),
    )


def cut(recipe: Recipe, *, per_device: int, accumulation: int) -> Recipe:
    """Return the recipe with its step cut into other micro-steps."""
    return recipe.but(
        data=recipe.data.but(atom=per_device),
        optim=recipe.optim.but(micro_steps=accumulation),
    )


def one_gpu(recipe: Recipe) -> Recipe:
    """Return the recipe as one GPU does it, a sample at a time."""
    alone = cut(recipe, per_device=1, accumulation=recipe.data.global_batch)
    return alone.but(scale=recipe.scale.but(workers="1"))
