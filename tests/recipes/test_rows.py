"""The published recipes against what their scripts and configs say, and the steps and warm-ups that follow."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rayllava.data.plan import Plan
from rayllava.data.sources._published import PUBLISHED_ROWS
from rayllava.families import FAMILIES
from rayllava.recipe import (
    Full,
    LoRA,
    ModelSpec,
    OptimSpec,
    Projector,
    QLoRA,
    Recipe,
    TowerFull,
    TowerLoRA,
    load,
    recipe_names,
)
from rayllava.recipes._origin import DATASETS, ORIGINS
from rayllava.train.optim import lr_factor

ROOT = Path(__file__).resolve().parents[2]

TUNING = {
    "projector": Projector(),
    "projector/nf4": Projector(quant="nf4"),
    "full": Full(),
    "full+lora": Full(vision=TowerLoRA(r=64, alpha=16, dropout=0.05)),
    "full+full": Full(vision=TowerFull()),
    "lora128": LoRA(r=128, alpha=256, dropout=0.05),
    "qlora512+lora": QLoRA(r=512, alpha=256, dropout=0.05, vision=TowerLoRA(r=64, alpha=16, dropout=0.05)),
    "qlora64": QLoRA(r=64, alpha=16, dropout=0.05),
}

ROWS = """
llava_v15.pretrain_7b          32x1x8   1e-3       plain           2048  projector      558k             2181
llava_v15.finetune_7b          16x1x8   2e-5       vicuna_v1       2048  full           mix665k          5198
llava_v15.lora_7b              16x1x8   2e-4/2e-5  vicuna_v1       2048  lora128        mix665k          5198
llava_v15.task_7b              16x1x8   2e-5       vicuna_v1       2048  full           -                -
llava_v15.task_lora_7b         16x1x8   2e-4/2e-5  vicuna_v1       2048  lora128        -                -
llava_v15.pretrain_13b         32x1x8   1e-3       plain           2048  projector      558k             2181
llava_v15.finetune_13b         16x1x8   2e-5       vicuna_v1       2048  full           mix665k          5198
llava_v15.lora_13b             16x1x8   2e-4/2e-5  vicuna_v1       2048  lora128        mix665k          5198
llava_v15.task_13b             16x1x8   2e-5       vicuna_v1       2048  full           -                -
llava_v15.task_lora_13b        16x1x8   2e-4/2e-5  vicuna_v1       2048  lora128        -                -
vicuna.pretrain_7b             32x1x8   1e-3       vicuna          2047  projector/nf4  558k             2181
vicuna.qlora_7b                16x1x8   2e-4       vicuna          2047  qlora512+lora  mix665k          5198
vicuna.qlora_7b_refcoco        16x1x8   2e-4       vicuna          2047  qlora512+lora  mix665k_refcoco  6292
vicuna.finetune_7b             16x1x8   2e-5       vicuna          2047  full           mix665k          5198
vicuna.pretrain_13b            32x1x8   1e-3       vicuna          2047  projector/nf4  558k             2181
vicuna.qlora_13b               16x1x8   2e-4       vicuna          2047  qlora512+lora  mix665k          5198
vicuna.official_pretrain_7b    32x1x8   1e-3       vicuna          2047  projector      558k             2181
vicuna.official_finetune_7b    16x1x8   2e-5       vicuna          2047  full           mix665k          5198
vicuna.official_lora_7b        16x1x8   2e-4       vicuna          2047  lora128        mix665k          5198
vicuna.official_pretrain_13b   32x1x8   1e-3       vicuna          2047  projector      558k             2181
vicuna.official_finetune_13b   16x1x8   2e-5       vicuna          2047  full           mix665k          5198
vicuna.official_lora_13b       16x1x8   2e-4       vicuna          2047  lora128        mix665k          5198
internlm.pretrain_7b           32x1x8   1e-3       internlm_chat   2047  projector/nf4  558k             2181
internlm.qlora_7b              16x1x8   2e-4       internlm_chat   2047  qlora512+lora  mix665k          5198
internlm2.pretrain_1_8b        32x1x8   1e-3       internlm2_chat  2047  projector/nf4  558k             2181
internlm2.qlora_1_8b           16x1x8   2e-4       internlm2_chat  2047  qlora512+lora  mix665k          5198
internlm2.pretrain_7b          32x1x8   1e-3       internlm2_chat  2047  projector/nf4  558k             2181
internlm2.qlora_7b             16x1x8   2e-4       internlm2_chat  2047  qlora512+lora  mix665k          5198
internlm2.finetune_7b          8x2x8    2e-5       internlm2_chat  2047  full           mix665k          5198
internlm2.pretrain_20b         32x1x8   1e-3       internlm2_chat  2047  projector/nf4  558k             2181
internlm2.qlora_20b            8x2x8    2e-4       internlm2_chat  2047  qlora512+lora  mix665k          5198
internlm2.finetune_20b         4x4x8    2e-5       internlm2_chat  2047  full           mix665k          5198
llama3.pretrain_8b             32x1x8   1e-3       llama3_chat     2047  projector      558k             2181
llama3.finetune_8b             8x2x8    2e-5       llama3_chat     2047  full           mix665k          5198
llama3.finetune_8b_tower_lora  8x2x8    2e-5       llama3_chat     2047  full+lora      mix665k          5198
llama3.pretrain_8b_sharegpt4v  16x2x8   1e-3       llama3_chat     4095  projector      sharegpt4v       4871
llama3.finetune_8b_internvl    4x4x8    2e-5       llama3_chat     4095  full+lora      internvl_sft     9905
llama3.pretrain_8b_one_gpu     1x256x1  1e-3       llama3_chat     2047  projector/nf4  558k             2181
llama3.qlora_8b_one_gpu        1x128x1  2e-4       llama3_chat     2047  qlora64        mix665k          5198
phi3.pretrain_mini             32x1x8   1e-3       phi3_chat       2047  projector      558k             2181
phi3.finetune_mini             8x2x8    2e-5       phi3_chat       2047  full           mix665k          5198
phi3.pretrain_mini_sharegpt4v  16x2x8   1e-3       phi3_chat       4095  projector      sharegpt4v       4871
phi3.finetune_mini_internvl    8x2x8    2e-5       phi3_chat       4095  full+full      internvl_sft     19810
internvl.pretrain_7b_336       32x1x8   1e-3       plain           2623  projector      558k             2181
internvl.finetune_7b_336       16x1x8   2e-5       vicuna_v1       2623  full           mix665k          5198
internvl.pretrain_13b_336      32x1x8   1e-3       plain           2623  projector      558k             2181
internvl.finetune_13b_336      16x1x8   2e-5       vicuna_v1       2623  full           mix665k          5198
internvl.custom_13b_336        2x2x128  2e-5       vicuna_v1       2623  full           -                -
internvl.pretrain_7b_448       32x1x8   1e-3       plain           3071  projector      558k             2181
internvl.finetune_7b_448       16x1x8   2e-5       vicuna_v1       3071  full           mix665k          5198
internvl.pretrain_13b_448      32x1x8   1e-3       plain           3071  projector      558k             2181
internvl.finetune_13b_448      16x1x8   2e-5       vicuna_v1       3071  full           mix665k          5198
internvl.pretrain_13b_448_v1_2  16x2x8   1e-3       plain           3071  projector      558k             2180
internvl.finetune_13b_448_v1_2  16x1x8   2e-5       vicuna_v1       3071  full           mix665k          5198
internvl.pretrain_13b_448_v1_5  16x2x8   1e-3       plain           3071  projector      558k             2180
internvl.finetune_13b_448_v1_5  16x1x8   2e-5       vicuna_v1       3071  full           mix665k          5198
"""
"""recipe, per-device batch x accumulation x GPUs, rate/of the projector, template, longest, tuning, data set and
optimizer steps."""

TABLE = {line.split()[0]: line.split()[1:] for line in ROWS.strip().splitlines()}

MICRO_STEPS = {
    "llama3.pretrain_8b_sharegpt4v": 9742,
    "phi3.pretrain_mini_sharegpt4v": 9742,
    "internlm2.finetune_7b": 10_396,
    "internlm2.qlora_20b": 10_396,
    "internlm2.finetune_20b": 20_792,
    "llama3.finetune_8b_internvl": 39_620,
    "phi3.finetune_mini_internvl": 39_620,
}
"""Iterations as XTuner counts and publishes them."""

LLMS = {
    "llava_v15": "lmsys/vicuna-{}-v1.5",
    "vicuna": "lmsys/vicuna-{}-v1.5",
    "internvl": "lmsys/vicuna-{}-v1.5",
    "internlm": "internlm/internlm-chat-{}",
    "internlm2": "internlm/internlm2-chat-{}",
    "llama3": "meta-llama/Meta-Llama-3-8B-Instruct",
    "phi3": "microsoft/Phi-3-mini-4k-instruct",
}


def model_of(recipe: Recipe) -> ModelSpec:
    while recipe.model is None:
        recipe = load(recipe.after)
    return recipe.model


def plan_of(recipe: Recipe, num_samples: int) -> Plan:
    data = recipe.data
    return Plan(
        num_samples,
        seed=recipe.seed,
        global_batch=data.global_batch,
        epochs=data.epochs,
        atom=data.atom,
        tail=data.tail,
    )


def test_every_published_recipe_is_in_the_table() -> None:
    published = {name for name in recipe_names() if not name.startswith("tiny.")}
    assert set(TABLE) == published == set(ORIGINS)


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_names_the_parts_of_its_source(name: str) -> None:
    module, function = name.split(".")
    model, size = model_of(load(name)), re.search(r"_(\d+(_\d)?b)", function)
    assert model.llm == LLMS[module].format(size and size[1])
    assert model.family == (module if module in FAMILIES else "vicuna")
    vision = "OpenGVLab/InternViT-6B-" if module == "internvl" else "openai/clip-vit-large-patch14-336"
    assert model.vision.startswith(vision)


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_has_the_numbers_of_its_source(name: str) -> None:
    batch, rates, template, longest, tuning, _, _ = TABLE[name]
    made = load(name)
    per_device, accumulation, gpus = map(int, batch.split("x"))
    lr, _, projector_lr = rates.partition("/")
    assert (made.data.atom, made.optim.micro_steps, made.scale.workers) == (per_device, accumulation, str(gpus))
    assert made.data.global_batch == per_device * accumulation * gpus
    assert (made.optim.lr, made.optim.projector_lr) == (float(lr), float(projector_lr) if projector_lr else None)
    assert (made.prompt.template, made.prompt.max_length) == (template, int(longest))
    assert made.tuning == TUNING[tuning]
    assert (made.optim.betas, made.optim.eps, made.optim.weight_decay) == ((0.9, 0.999), 1e-8, 0)
    assert (made.optim.warmup, made.optim.vision_lr, made.scale.dtype) == (0.03, None, "bfloat16")


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_follows_the_rules_of_its_project(name: str) -> None:
    made, project = load(name), ORIGINS[name].project
    first = made.tuning.kind == "projector"
    assert made.prompt.aspect == ("crop" if first else "pad")
    assert made.optim.schedule == ("mmengine" if project == "XTuner" else "trainer")
    assert made.optim.clip == (1.0 if project == "XTuner" else 0.0)
    grouped = "length" if project == "XTuner" else "modality"
    assert made.data.group == ("none" if first or name == "internvl.custom_13b_336" else grouped)
    tail = "repeat" if project == "XTuner" else "drop" if re.search(r"\.pretrain.*v1_", name) else "short"
    assert made.data.tail == tail
    one = name == "internvl.custom_13b_336" or tail == "drop"
    assert made.scale.zero == (1 if one else 2 if first or project == "XTuner" else 3)
    assert made.seed == (1024 if name.startswith(("llama3.", "phi3.")) else 42)
    assert made.data.epochs == (2 if name == "phi3.finetune_mini_internvl" else 1)


@pytest.mark.parametrize("name", TABLE)
def test_a_stage_starts_from_what_fits_it(name: str) -> None:
    made = load(name)
    if made.tuning.kind == "projector":
        assert made.model is not None and not made.after
        return
    before = load(made.after)
    assert made.model is None and made.prompt.max_length == before.prompt.max_length
    if "task" in name:
        assert before.tuning == Full()
    else:
        assert before.tuning.kind == "projector"
    if ORIGINS[name].project == "XTuner":
        assert made.prompt.template == before.prompt.template


@pytest.mark.parametrize(
    ("name", "vision", "layer", "size"),
    [
        ("7b_336", "224px", -4, 336),
        ("7b_448", "448px", -4, 448),
        ("13b_448_v1_2", "448px-V1-2", -1, 448),
        ("13b_448_v1_5", "448px-V1-5", -1, 448),
    ],
)
def test_internvl_reads_its_tower_where_the_scripts_do(name: str, vision: str, layer: int, size: int) -> None:
    made = load(f"internvl.finetune_{name}")
    model = model_of(made)
    assert model.vision == f"OpenGVLab/InternViT-6B-{vision}"
    assert (model.vision_feature_layer, model.image_size) == (layer, size)
    assert made.prompt.max_length == 2047 + (size // 14) ** 2


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_takes_the_published_number_of_steps(name: str) -> None:
    made, (data, steps) = load(name), TABLE[name][-2:]
    assert ORIGINS[name].data == data.strip("-")
    if data == "-":
        return
    plan = plan_of(made, DATASETS[data].num_samples)
    assert plan.num_steps == int(steps)
    assert plan.num_steps * made.optim.micro_steps == MICRO_STEPS.get(name, plan.num_steps * made.optim.micro_steps)
    assert len(plan.atoms(0)) == made.optim.micro_steps * made.scale.max_workers
    plan.check_workers(made.scale.max_workers)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row[-1] != "-"])
def test_the_docstring_of_a_recipe_says_its_steps(name: str) -> None:
    import importlib

    module, function = name.split(".")
    doc = getattr(importlib.import_module(f"rayllava.recipes.{module}"), function).__doc__
    assert re.search(r"(\d+) steps\.$", doc)[1] == TABLE[name][-1]


@pytest.mark.parametrize("num_samples", [1_246_849, 1_246_976])
def test_all_that_sharegpt4v_may_hold_gives_the_same_steps(num_samples: int) -> None:
    assert plan_of(load("llama3.pretrain_8b_sharegpt4v"), num_samples).num_steps == 4871


@pytest.mark.parametrize(
    ("name", "num_warmup"),
    [
        ("llava_v15.pretrain_7b", 66),
        ("llava_v15.finetune_7b", 156),
        ("vicuna.pretrain_7b", 65),
        ("vicuna.qlora_7b", 155),
        ("llama3.finetune_8b", 311),
        ("internlm2.finetune_20b", 623),
        ("llama3.pretrain_8b_sharegpt4v", 292),
        ("llama3.finetune_8b_internvl", 1188),
        ("phi3.finetune_mini_internvl", 1188),
    ],
)
def test_a_recipe_warms_up_as_long_as_its_source(name: str, num_warmup: int) -> None:
    """In optimizer steps for the Trainer, in micro-steps for mmengine."""
    made = load(name)
    num_steps = plan_of(made, DATASETS[ORIGINS[name].data].num_samples).num_steps
    num_micro = num_steps * made.optim.micro_steps
    micro = made.optim.but(micro_steps=1)
    factors = [lr_factor(i, num_steps=num_micro, optim=micro) for i in range(num_micro)]
    assert max(i for i, factor in enumerate(factors) if factor == 1) == num_warmup
    assert sorted(factors[:num_warmup]) == factors[:num_warmup]
    assert sorted(factors[num_warmup:], reverse=True) == factors[num_warmup:]
    assert 0 < factors[-1] < 1e-6
    if made.optim.schedule == "mmengine":
        taken = [lr_factor(k, num_steps=num_steps, optim=made.optim) for k in range(num_steps)]
        assert taken == factors[made.optim.micro_steps - 1 :: made.optim.micro_steps]


@pytest.mark.parametrize(
    ("num_steps", "num_warmup"), [(2181, 66), (5198, 156), (4871, 147), (9905, 298), (19_810, 595)]
)
def test_the_trainer_warms_up_over_a_fraction_rounded_up(num_steps: int, num_warmup: int) -> None:
    optim = OptimSpec(lr=1e-3)
    factors = [lr_factor(k, num_steps=num_steps, optim=optim) for k in range(num_steps)]
    assert factors.index(1.0) == num_warmup == math.ceil(0.03 * num_steps)


def test_data_sets_are_those_that_the_data_page_explains() -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    for key, data in DATASETS.items():
        assert f"shards/{key}" in page
        assert key == "sharegpt4v" or key == "mix665k_refcoco" or f"{data.num_samples:,}" in page
    parts = {"blip_laion_cc_sbu_558k": "558k", "llava_v1_5_mix665k": "mix665k"}
    for file, key in parts.items():
        assert DATASETS[key].num_samples == PUBLISHED_ROWS[file]
    rest = sum(rows for file, rows in PUBLISHED_ROWS.items() if file not in parts)
    assert DATASETS["internvl_sft"].num_samples == rest
    assert DATASETS["mix665k_refcoco"].num_samples == DATASETS["mix665k"].num_samples + 2 * 70_000


def test_the_page_of_recipes_is_what_the_recipes_say() -> None:
    command = [sys.executable, "-m", "rayllava.recipes"]
    env = {"PYTHONPATH": str(ROOT / "platform"), "PYTHONIOENCODING": "utf-8"}
    printed = subprocess.run(command, check=True, capture_output=True, env=env).stdout.decode()
    assert printed == (ROOT / "docs" / "recipes.md").read_text()
