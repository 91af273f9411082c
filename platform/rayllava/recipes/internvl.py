"""InternVL-Chat-LLaVA, InternViT-6B under Vicuna: the numbers of internvl_chat_llava/scripts_internvl.

They differ from LLaVA-v1.5 in the tower, and in `prompt.max_length`: the fork cuts at 2048 ids, a picture being one
of them, and no more once it has become 576 or 1024 positions.
"""

from __future__ import annotations

from rayllava.recipe import ModelSpec, Recipe
from rayllava.recipes import llava_v15
from rayllava.recipes._origin import reproduces

_7B_336 = ModelSpec(
    llm="lmsys/vicuna-7b-v1.5",
    vision="OpenGVLab/InternViT-6B-224px",
    family="vicuna",
    vision_feature_layer=-4,
    image_size=336,
)
_13B_336 = _7B_336.but(llm="lmsys/vicuna-13b-v1.5")
_7B_448 = _7B_336.but(vision="OpenGVLab/InternViT-6B-448px", image_size=448)
_13B_448 = _7B_448.but(llm="lmsys/vicuna-13b-v1.5")
_13B_448_V1_2 = _13B_448.but(vision="OpenGVLab/InternViT-6B-448px-V1-2", vision_feature_layer=-1)
_13B_448_V1_5 = _13B_448_V1_2.but(vision="OpenGVLab/InternViT-6B-448px-V1-5")


def _pretrain(model: ModelSpec) -> Recipe:
    assert model.image_size is not None
    num_image_tokens = (model.image_size // 14) ** 2
    base = llava_v15.pretrain_7b()
    return base.but(model=model, prompt=base.prompt.but(max_length=2048 - 1 + num_image_tokens))


def _finetune(first: Recipe, after: str) -> Recipe:
    base = llava_v15.finetune_7b()
    return base.but(after=after, prompt=base.prompt.but(max_length=first.prompt.max_length))


@reproduces("InternVL", "pretrain_internvit6b_224to336_vicuna7b.sh", data="558k")
def pretrain_7b_336() -> Recipe:
    """Stage 1 (pretrain_internvit6b_224to336_vicuna7b.sh): 2181 steps."""
    return _pretrain(_7B_336)


@reproduces("InternVL", "finetune_internvit6b_224to336_vicuna7b.sh", data="mix665k")
def finetune_7b_336() -> Recipe:
    """Stage 2 (finetune_internvit6b_224to336_vicuna7b.sh): 5198 steps."""
    return _finetune(pretrain_7b_336(), after="internvl.pretrain_7b_336")


@reproduces("InternVL", "pretrain_internvit6b_224to336_vicuna13b.sh", data="558k")
def pretrain_13b_336() -> Recipe:
    """Stage 1 (pretrain_internvit6b_224to336_vicuna13b.sh): 2181 steps."""
    return _pretrain(_13B_336)


@reproduces("InternVL", "finetune_internvit6b_224to336_vicuna13b.sh", data="mix665k")
def finetune_13b_336() -> Recipe:
    """Stage 2 (finetune_internvit6b_224to336_vicuna13b.sh): 5198 steps."""
    return _finetune(pretrain_13b_336(), after="internvl.pretrain_13b_336")


@reproduces("InternVL", "finetune_internvit6b_224to336_vicuna13b_custom_data.sh")
def custom_13b_336() -> Recipe:
    """Stage 2 on a mixture of your own, 128 GPUs (finetune_internvit6b_224to336_vicuna13b_custom_data.sh)."""
    usual = finetune_13b_336()
    return usual.but(
        data=usual.data.but(global_batch=512, atom=2, group="none"),
        optim=usual.optim.but(micro_steps=2),
        scale=usual.scale.but(workers="128", zero=1),
    )


@reproduces("InternVL", "pretrain_internvit6b_448_vicuna7b.sh", data="558k")
def pretrain_7b_448() -> Recipe:
    """Stage 1 (pretrain_internvit6b_448_vicuna7b.sh): 2181 steps."""
    return _pretrain(_7B_448)


@reproduces("InternVL", "finetune_internvit6b_448_vicuna7b.sh", data="mix665k")
def finetune_7b_448() -> Recipe:
    """Stage 2 (finetune_internvit6b_448_vicuna7b.sh): 5198 steps."""
    return _finetune(pretrain_7b_448(), after="internvl.pretrain_7b_448")


@reproduces("InternVL", "pretrain_internvit6b_448_vicuna13b.sh", data="558k")
def pretrain_13b_448() -> Recipe:
    """Stage 1 (pretrain_internvit6b_448_vicuna13b.sh): 2181 steps."""
    return _pretrain(_13B_448)


@reproduces("InternVL", "finetune_internvit6b_448_vicuna13b.sh", data="mix665k")
def finetune_13b_448() -> Recipe:
    """Stage 2 (finetune_internvit6b_448_vicuna13b.sh): 5198 steps."""
    return _finetune(pretrain_13b_448(), after="internvl.pretrain_13b_448")


@reproduces("InternVL", "pretrain_internvit6b_448_v1_2_vicuna13b.sh", data="558k")
def pretrain_13b_448_v1_2() -> Recipe:
    """Stage 1 (pretrain_internvit6b_448_v1_2_vicuna13b.sh): 2180 steps."""
    usual = _pretrain(_13B_448_V1_2)
    return usual.but(
        # The Trainer of that time drops micro-steps that do not fill a step, here one of 48 samples.
        data=usual.data.but(atom=16, tail="drop"),
        optim=usual.optim.but(micro_steps=2),
        scale=usual.scale.but(zero=1),
    )


@reproduces("InternVL", "finetune_internvit6b_448_v1_2_vicuna13b.sh", data="mix665k")
def finetune_13b_448_v1_2() -> Recipe:
    """Stage 2 (finetune_internvit6b_448_v1_2_vicuna13b.sh): 5198 steps."""
    return finetune_13b_448().but(after="internvl.pretrain_13b_448_v1_2")


@reproduces("InternVL", "pretrain_internvit6b_448_v1_5_vicuna13b.sh", data="558k")
def pretrain_13b_448_v1_5() -> Recipe:
    """Stage 1 (pretrain_internvit6b_448_v1_5_vicuna13b.sh): 2180 steps."""
    return pretrain_13b_448_v1_2().but(model=_13B_448_V1_5)


@reproduces("InternVL", "finetune_internvit6b_448_v1_5_vicuna13b.sh", data="mix665k")
def finetune_13b_448_v1_5() -> Recipe:
    """Stage 2 (finetune_internvit6b_448_v1_5_vicuna13b.sh): 5198 steps."""
    return finetune_13b_448().but(after="internvl.pretrain_13b_448_v1_5")
