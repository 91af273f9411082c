"""Recipes under the names that users of the original projects know."""

from __future__ import annotations

import pytest

from rayllava.recipe import load, recipe_names
from rayllava.recipes._origin import LEFT_OUT, ORIGINS

T = "clip_vit_large_p14_336"

XTUNER = {
    f"llava_vicuna_7b_v15_{T}_e1_gpu8_pretrain": "vicuna.pretrain_7b",
    f"llava_vicuna_13b_v15_{T}_e1_gpu8_pretrain": "vicuna.pretrain_13b",
    f"llava_internlm_chat_7b_{T}_e1_gpu8_pretrain": "internlm.pretrain_7b",
    f"llava_internlm2_chat_1_8b_{T}_e1_gpu8_pretrain": "internlm2.pretrain_1_8b",
    f"llava_internlm2_chat_7b_{T}_e1_gpu8_pretrain": "internlm2.pretrain_7b",
    f"llava_internlm2_chat_20b_{T}_e1_gpu8_pretrain": "internlm2.pretrain_20b",
    f"llava_llama3_8b_instruct_{T}_e1_gpu8_pretrain": "llama3.pretrain_8b",
    f"llava_llama3_8b_instruct_{T}_e1_gpu8_sharegpt4v_pretrain": "llama3.pretrain_8b_sharegpt4v",
    f"llava_llama3_8b_instruct_quant_{T}_e1_gpu1_pretrain": "llama3.pretrain_8b_one_gpu",
    f"llava_phi3_mini_4k_instruct_{T}_e1_gpu8_pretrain": "phi3.pretrain_mini",
    f"llava_phi3_mini_4k_instruct_{T}_e1_gpu8_sharegpt4v_pretrain": "phi3.pretrain_mini_sharegpt4v",
    f"llava_vicuna_7b_v15_qlora_{T}_lora_e1_gpu8_finetune": "vicuna.qlora_7b",
    f"llava_vicuna_7b_v15_qlora_{T}_lora_e1_gpu8_finetune_refcoco": "vicuna.qlora_7b_refcoco",
    f"llava_vicuna_13b_v15_qlora_{T}_lora_e1_gpu8_finetune": "vicuna.qlora_13b",
    f"llava_internlm_chat_7b_qlora_{T}_lora_e1_gpu8_finetune": "internlm.qlora_7b",
    f"llava_internlm2_chat_1_8b_qlora_{T}_lora_e1_gpu8_finetune": "internlm2.qlora_1_8b",
    f"llava_internlm2_chat_7b_qlora_{T}_lora_e1_gpu8_finetune": "internlm2.qlora_7b",
    f"llava_internlm2_chat_20b_qlora_{T}_lora_e1_gpu8_finetune": "internlm2.qlora_20b",
    f"llava_llama3_8b_instruct_qlora_{T}_e1_gpu1_finetune": "llama3.qlora_8b_one_gpu",
    f"llava_vicuna_7b_v15_{T}_e1_gpu8_finetune": "vicuna.finetune_7b",
    f"llava_internlm2_chat_7b_{T}_e1_gpu8_finetune": "internlm2.finetune_7b",
    f"llava_internlm2_chat_20b_{T}_e1_gpu8_finetune": "internlm2.finetune_20b",
    f"llava_llama3_8b_instruct_full_{T}_e1_gpu8_finetune": "llama3.finetune_8b",
    f"llava_llama3_8b_instruct_full_{T}_lora_e1_gpu8_finetune": "llama3.finetune_8b_tower_lora",
    f"llava_llama3_8b_instruct_full_{T}_lora_e1_gpu8_internvl_finetune": "llama3.finetune_8b_internvl",
    f"llava_phi3_mini_4k_instruct_full_{T}_e1_gpu8_finetune": "phi3.finetune_mini",
    f"llava_phi3_mini_4k_instruct_full_{T}_full_e2_gpu8_internvl_finetune": "phi3.finetune_mini_internvl",
    "llava_v15_7b_pretrain": "vicuna.official_pretrain_7b",
    "llava_v15_7b_finetune": "vicuna.official_finetune_7b",
    "llava_v15_7b_finetune_lora": "vicuna.official_lora_7b",
    "llava_v15_13b_pretrain": "vicuna.official_pretrain_13b",
    "llava_v15_13b_finetune": "vicuna.official_finetune_13b",
    "llava_v15_13b_finetune_lora": "vicuna.official_lora_13b",
}

SCRIPTS = {
    "pretrain": "llava_v15.pretrain_13b",
    "finetune": "llava_v15.finetune_13b",
    "finetune_lora": "llava_v15.lora_13b",
    "finetune_task": "llava_v15.task_13b",
    "finetune_task_lora": "llava_v15.task_lora_13b",
    "pretrain_internvit6b_224to336_vicuna7b": "internvl.pretrain_7b_336",
    "pretrain_internvit6b_224to336_vicuna13b": "internvl.pretrain_13b_336",
    "finetune_internvit6b_224to336_vicuna7b": "internvl.finetune_7b_336",
    "finetune_internvit6b_224to336_vicuna13b": "internvl.finetune_13b_336",
    "finetune_internvit6b_224to336_vicuna13b_custom_data": "internvl.custom_13b_336",
    "pretrain_internvit6b_448_vicuna7b": "internvl.pretrain_7b_448",
    "pretrain_internvit6b_448_vicuna13b": "internvl.pretrain_13b_448",
    "finetune_internvit6b_448_vicuna7b": "internvl.finetune_7b_448",
    "finetune_internvit6b_448_vicuna13b": "internvl.finetune_13b_448",
    "pretrain_internvit6b_448_v1_2_vicuna13b": "internvl.pretrain_13b_448_v1_2",
    "pretrain_internvit6b_448_v1_5_vicuna13b": "internvl.pretrain_13b_448_v1_5",
    "finetune_internvit6b_448_v1_2_vicuna13b": "internvl.finetune_13b_448_v1_2",
    "finetune_internvit6b_448_v1_5_vicuna13b": "internvl.finetune_13b_448_v1_5",
}

ENDINGS = {**dict.fromkeys(XTUNER, ".py"), **dict.fromkeys(SCRIPTS, ".sh")}


@pytest.mark.parametrize(("stem", "name"), [*XTUNER.items(), *SCRIPTS.items()])
def test_an_upstream_file_names_its_recipe(stem: str, name: str) -> None:
    file = stem + ENDINGS[stem]
    for told in (stem, file, f"somewhere/else/{file}", f"./{stem}"):
        assert load(told) == load(name)
        assert load(told).name == name


def test_every_recipe_but_the_variants_of_a_script_has_an_upstream_name() -> None:
    named = {name for name, origin in ORIGINS.items() if origin.named}
    assert sorted(named) == sorted({**XTUNER, **SCRIPTS}.values())
    assert {name for name in ORIGINS if name not in named} == {
        f"llava_v15.{name}_7b" for name in ("pretrain", "finetune", "lora", "task", "task_lora")
    }


def test_llavas_scripts_may_be_told_by_their_folder() -> None:
    assert load("LLaVA/scripts/v1_5/finetune_lora.sh").name == "llava_v15.lora_13b"


def test_upstream_names_are_not_listed_among_recipes() -> None:
    assert not {*XTUNER, *SCRIPTS} & set(recipe_names())


@pytest.mark.parametrize("file", LEFT_OUT)
def test_a_file_that_is_left_out_is_answered_with_the_reason(file: str) -> None:
    for told in (file, f"LLaVA/{file}", file.rpartition(".")[0]):
        with pytest.raises(LookupError) as caught:
            load(told)
        assert str(caught.value) == f"{told} is left out: {LEFT_OUT[file]}"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("qlora_7b", "give one of: internlm.qlora_7b, internlm2.qlora_7b, vicuna.qlora_7b, vicuna.qlora_7b_refcoco"),
        (
            "llava_internlm2_chat_20b",
            "give one of: internlm2.pretrain_20b, internlm2.qlora_20b, internlm2.finetune_20b",
        ),
        ("llava_v15_7b", "may be several recipes; give one of: vicuna.official_pretrain_7b, "),
    ],
)
def test_part_of_several_names_is_answered_with_the_candidates(told: str, said: str) -> None:
    with pytest.raises(LookupError) as caught:
        load(told)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("told", "near"),
    [
        (f"llava_phi3_mini_4k_instruct_{T}_e1_gpu8_pretrian.py", "phi3.pretrain_mini"),
        ("finetune_8b_internvl", "llama3.finetune_8b_internvl"),
        ("llava_v15.finetune_70b", "llava_v15.finetune_7b"),
    ],
)
def test_a_slip_is_answered_with_the_recipe_that_is_near(told: str, near: str) -> None:
    with pytest.raises(LookupError, match=rf"^no recipe '{told}'; did you mean {near}\? there are: .*tiny\.pretrain"):
        load(told)
