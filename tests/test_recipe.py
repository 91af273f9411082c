"""Knobs: names, bounds, and what a person is told who gets one wrong."""

from __future__ import annotations

import pytest

from rayllava.recipe import Full, QLoRA, TowerLoRA, load, override


def test_words_change_one_field_each_and_nothing_else() -> None:
    before = load("tiny.pretrain")
    after = override(before, ["data=shards/mix", "optim.lr=1e-5", "scale.workers=1:4", "out=runs/a"])
    assert after.data == before.data.but(shards="shards/mix")
    assert (after.optim.lr, after.scale.min_workers, after.scale.max_workers) == (1e-5, 1, 4)
    assert after.but(data=before.data, optim=before.optim, scale=before.scale, out="") == before


def test_a_variant_is_written_as_a_difference() -> None:
    assert load("tiny.pretrain").but(tuning=Full()).tuning.kind == "full"


def test_another_kind_of_group_keeps_the_fields_that_both_have() -> None:
    made = override(load("tiny.pretrain"), ["tuning=lora", "tuning.r=8", "tuning.vision=lora", "tuning=qlora"])
    assert made.tuning == QLoRA(r=8, alpha=256, vision=TowerLoRA())
    assert override(made, ["tuning=full"]).tuning == Full(vision=TowerLoRA())


def test_a_group_that_is_empty_can_be_filled() -> None:
    words = ["model.llm=a", "model.vision=b", "model.family=vicuna"]
    made = override(load("tiny.finetune"), words)
    assert made.model is not None and made.model.llm == "a"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optim.lrr=1", "unknown field optim.lrr; did you mean lr? there are: lr, projector_lr"),
        ("optm.lr=1", "unknown field optm; did you mean optim?"),
        ("optim=3", "optim=3: optim is a group of fields; set one of them, as in optim.lr=..."),
        ("optim.lr=-1", "optim.lr=-1: input should be greater than 0"),
        ("optim.lr=fast", "optim.lr=fast: input should be a valid number"),
        ("scale.workers=4:2", "scale.workers=4:2: give N or MIN:MAX with 1 <= MIN <= MAX"),
        ("scale.zero=7", "scale.zero=7: input should be 0, 1, 2 or 3"),
        ("scale.zero=0 scale.dtype=bfloat16", "scale: zero=0 is for float32"),
        ("data.atom=1000", "data.atom=1000 exceeds data.global_batch=32; lower it"),
        (
            "data.max_tokens=100",
            "data.max_tokens=100 is less than prompt.max_length=256, the longest example; use at least 256",
        ),
        ("data.max_tokens=1", "data.max_tokens=1: input should be greater than or equal to 8"),
        ("data.group=both", "data.group=both: input should be 'none', 'modality' or 'length'"),
        ("seed.x=1", "seed.x=1: seed has no fields of its own"),
        ("tuning=some", "tuning=some: input tag 'some' found using 'kind' does not match any of the expected tags"),
        ("tuning=full tuning.r=3", "unknown field tuning.r; there are: kind, vision"),
        ("tuning=lora tuning.vision=lora tuning.vision.r=0", "tuning.vision.r=0: input should be greater than"),
        ("hello", "'hello' is not field.path=value"),
    ],
)
def test_a_wrong_word_is_answered_with_field_value_and_cure(word: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        override(load("tiny.pretrain"), word.split())
    message = str(caught.value)
    assert said.split(":")[0] in message and said.split(": ")[-1] in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["tiny.pretrian", "nothing", "tiny._SCALE", "tiny.DataSpec", "os.system"])
def test_an_unknown_recipe_is_answered_with_what_there_is(name: str) -> None:
    with pytest.raises(LookupError) as caught:
        load(name)
    assert "there are: " in str(caught.value) and "tiny.pretrain" in str(caught.value)


def test_a_near_miss_is_named() -> None:
    with pytest.raises(LookupError, match=r"did you mean tiny\.pretrain"):
        load("tiny.pretrian")
