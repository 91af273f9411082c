"""Every line of language models, and every kind of tower, trains, resumes and leaves a model that others read."""

from __future__ import annotations

from typing import Any

import pytest

from rayllava.families import FAMILIES
from rayllava.recipe import ModelSpec
from tests.model.kinds import TEXT
from tests.train.lines import PEAK_TFLOPS
from tests.train.ranks import run_ranks

LORA = {"kind": "lora", "r": 4, "alpha": 8}
QLORA = {"kind": "qlora", "r": 4, "alpha": 8}
ADAPTED, TRAINED = {"vision": {"kind": "lora", "r": 4}}, {"vision": {"kind": "full"}}

LINES: dict[str, dict[str, Any]] = {
    "vicuna-clip": {"llm": "vicuna", "tower": "clip", "zero": 2, "tuning": {"kind": "projector", "quant": "nf4"}},
    "llama2-clip": {"llm": "llama2", "tower": "clip@42", "zero": 2, "tuning": LORA},
    "llama3-siglip": {"llm": "llama3", "tower": "siglip", "zero": 3, "tuning": {"kind": "full"} | ADAPTED},
    "phi3-clip": {"llm": "phi3", "tower": "clip", "zero": 2, "tuning": {"kind": "full"} | TRAINED},
    "internlm-internvl": {"llm": "internlm", "tower": "internvl_vision", "zero": 2, "tuning": QLORA | ADAPTED},
    "internlm2-internvit": {"llm": "internlm2", "tower": "intern_vit_6b@42", "zero": 3, "tuning": QLORA | ADAPTED},
    "qwen2-internvit": {"llm": "qwen2", "tower": "intern_vit_6b", "zero": 2, "tuning": {"kind": "full"} | TRAINED},
}


@pytest.fixture(scope="module")
def found(parts: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    task = {"folder": str(tmp_path_factory.mktemp("lines")), "tokenizer": parts.llm, "lines": LINES}
    return run_ranks("tests.train.lines:all_lines", 1, task)[0]


def test_no_family_is_left_out() -> None:
    assert {line["llm"] for line in LINES.values()} == set(FAMILIES)


@pytest.mark.parametrize("line", LINES)
def test_a_line_trains_and_resumes_to_the_same_loss(line: str, found: dict[str, dict[str, Any]]) -> None:
    first, again = found[line]["losses"]
    assert len(first) == 2 and first == pytest.approx(again, rel=1e-5)
    assert found[line]["moved"] > 1e-3


@pytest.mark.parametrize("line", LINES)
def test_metrics_tell_useful_tokens_and_the_share_of_the_peak(line: str, found: dict[str, dict[str, Any]]) -> None:
    first, again = found[line]["metrics"]
    assert first["tokens_per_second"] == pytest.approx(first["num_tokens"] / first["seconds"])
    assert first["num_tokens"] < first["num_positions"]
    # The same step in other seconds: the same FLOPs, and more than the MLPs take alone, frozen.
    flops = [metrics["mfu"] * metrics["seconds"] * 1e12 * PEAK_TFLOPS for metrics in (first, again)]
    mlps = 2 * 3 * TEXT["hidden_size"] * TEXT["intermediate_size"]
    assert flops[0] == pytest.approx(flops[1]) and flops[0] > 4 * mlps * first["num_tokens"]


@pytest.mark.parametrize("line", LINES)
def test_plain_transformers_reads_a_line_to_the_same_logits(line: str, found: dict[str, dict[str, Any]]) -> None:
    told = found[line]
    assert told["off"] <= 1e-4 and not told["strange"] and not told["weights"]
    kinds = {"phi3": "phi3", "qwen2": "qwen2"}
    tower = LINES[line]["tower"].partition("@")[0]
    towers = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
    assert told["types"] == [kinds.get(LINES[line]["llm"], "llama"), towers.get(tower, "internvl_vision")]


@pytest.mark.parametrize("line", LINES)
def test_pictures_have_the_towers_statistics_and_the_recipes_size(
    line: str, found: dict[str, dict[str, Any]]
) -> None:
    size = int(LINES[line]["tower"].partition("@")[2] or 28)
    assert found[line]["shape"] == [size, (size // 14) ** 2]
    assert found[line]["norm"] == (0.485 if "intern" in LINES[line]["tower"] else 0.48145466)
