"""LLaVA-v1.5, 7B and 13B: the numbers of haotian-liu/LLaVA's scripts/v1_5.

The scripts are written for 13B; 7B differs in the names of the models alone. `optim.clip` is 0: their DeepSpeed files
do not name it, and DeepSpeed then left gradients alone, so that is how the published models were trained.
"""

from __future__ import annotations

from rayllava.recipe import DataSpec, Full, LoRA, ModelSpec, OptimSpec, Projector, PromptSpec, Recipe, ScaleSpec
from rayllava.recipes._origin import reproduces

_MODEL_7B = ModelSpec(llm="lmsys/vicuna-7b-v1.5", vision="openai/clip-vit-large-patch14-336", family="vicuna")
_MODEL_13B = _MODEL_7B.but(llm="lmsys/vicuna-13b-v1.5")


@reproduces("LLaVA", "pretrain.sh", data="558k", named=False)
def pretrain_7b() -> Recipe:
    """Stage 1 (pretrain.sh): 2181 steps."""
    return Recipe(
        model=_MODEL_7B,
        prompt=PromptSpec(template="plain", aspect="crop", max_length=2048),
        tuning=Projector(),
        data=DataSpec(global_batch=256, atom=32, tail="short"),
        optim=OptimSpec(lr=1e-3, schedule="trainer", clip=0),
        scale=ScaleSpec(workers="8", zero=2),
    )


@reproduces("LLaVA", "finetune.sh", data="mix665k", named=False)
def finetune_7b() -> Recipe:
    """Stage 2 (finetune.sh): 5198 steps."""
    first = pretrain_7b()
    return first.but(
        model=None,
        after="llava_v15.pretrain_7b",
        prompt=first.prompt.but(template="vicuna_v1", aspect="pad"),
        tuning=Full(),
        data=first.data.but(global_batch=128, atom=16, group="modality"),
        optim=first.optim.but(lr=2e-5),
        scale=first.scale.but(zero=3),
    )


@reproduces("LLaVA", "finetune_lora.sh", data="mix665k", named=False)
def lora_7b() -> Recipe:
    """Stage 2 with LoRA, the projector at a tenth of its rate (finetune_lora.sh): 5198 steps."""
    full = finetune_7b()
    return full.but(tuning=LoRA(r=128, alpha=256), optim=full.optim.but(lr=2e-4, projector_lr=2e-5))


@reproduces("LLaVA", "finetune_task.sh", named=False)
def task_7b() -> Recipe:
    """A finished LLaVA-v1.5 on data of your own (finetune_task.sh)."""
    return finetune_7b().but(after="llava_v15.finetune_7b")


@reproduces("LLaVA", "finetune_task_lora.sh", named=False)
def task_lora_7b() -> Recipe:
    """A finished LLaVA-v1.5 on data of your own, with LoRA (finetune_task_lora.sh)."""
    return lora_7b().but(after="llava_v15.finetune_7b")


@reproduces("LLaVA", "pretrain.sh", data="558k")
def pretrain_13b() -> Recipe:
    """Stage 1 (pretrain.sh): 2181 steps."""
    return pretrain_7b().but(model=_MODEL_13B)


@reproduces("LLaVA", "finetune.sh", data="mix665k")
def finetune_13b() -> Recipe:
    """Stage 2 (finetune.sh): 5198 steps."""
    return finetune_7b().but(after="llava_v15.pretrain_13b")


@reproduces("LLaVA", "finetune_lora.sh", data="mix665k")
def lora_13b() -> Recipe:
    """Stage 2 with LoRA (finetune_lora.sh): 5198 steps."""
    return lora_7b().but(after="llava_v15.pretrain_13b")


@reproduces("LLaVA", "finetune_task.sh")
def task_13b() -> Recipe:
    """A finished LLaVA-v1.5 on data of your own (finetune_task.sh)."""
    return task_7b().but(after="llava_v15.finetune_13b")


@reproduces("LLaVA", "finetune_task_lora.sh")
def task_lora_13b() -> Recipe:
    """A finished LLaVA-v1.5 on data of your own, with LoRA (finetune_task_lora.sh)."""
    return task_lora_7b().but(after="llava_v15.finetune_13b")
