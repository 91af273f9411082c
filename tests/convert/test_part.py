"""Parts of a model convert alone, and compute what they computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayllava.convert.run import ConvertSpec, convert
from tests.convert.trained import ALPHA, ASSETS, FAMILIES, RANK, make

PHI3 = ASSETS / "xtuner_phi3"


def alone(src: Path, dst: Path, *, to: str, **spec: Any) -> dict[str, Any]:
    proof = convert(src, dst, to=to, spec=ConvertSpec(**spec))
    assert proof["proved"] and proof["bit_equal"], proof
    assert json.loads((dst / "proof.json").read_text())["part"] == spec["part"]
    return proof


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_becomes_a_llama(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make(tmp_path / "made", family, "lora")
    alone(folder / "llm", tmp_path / "llama", to="llava", part="llm", family=family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    if family == "phi3":
        before = AutoModelForCausalLM.from_pretrained(folder / "llm", dtype=torch.float32)
        ids = torch.arange(5, 25).unsqueeze(0)
        with torch.inference_mode():
            assert (model(input_ids=ids).logits - before(input_ids=ids).logits).abs().max() < 1e-5
    assert any((tmp_path / "llama" / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def test_a_base_is_not_destroyed_by_force(tmp_path: Path) -> None:
    folder = make(tmp_path / "made", "llama3", "lora")
    spec = ConvertSpec(part="llm", base=str(folder / "llm"), family="llama3", force=True)
    with pytest.raises(ValueError, match=r"would overwrite .*llm; give another folder"):
        convert(folder / "trained" / "llm_adapter", folder / "llm", to="hf", spec=spec)
    assert (folder / "llm" / "config.json").is_file()


@pytest.mark.parametrize("family", ["llama3", "phi3", "internlm2"])
def test_an_adapter_is_merged_into_its_language_model(family: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "made", family, "lora")
    adapter = folder / "trained" / "llm_adapter"
    alone(adapter, tmp_path / "llm", to="hf", part="llm", base=str(folder / "llm"), family=family, dtype="float32")
    alone(folder / "trained", tmp_path / "too", to="hf", part="llm", base=str(folder / "llm"), family=family)
    got, base = load_file(tmp_path / "llm" / "model.safetensors"), load_file(folder / "llm" / "model.safetensors")
    trained = torch.load(folder / "iter_9.pth", weights_only=True)["state_dict"]
    leaf = {"llama3": "mlp.down_proj", "phi3": "mlp.down_proj", "internlm2": "feed_forward.w2"}[family]
    up, down = (trained[f"llm.base_model.model.model.layers.1.{leaf}.lora_{x}.default.weight"] for x in ("B", "A"))
    want = base[f"model.layers.1.{leaf}.weight"].float() + ALPHA / RANK * up @ down
    assert (got["model.layers.1.mlp.down_proj.weight"] - want).abs().max() < 1e-6


def test_an_adapter_is_merged_into_its_tower(tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    folder = make(tmp_path / "made", "vicuna", "lora")
    adapter = folder / "trained" / "visual_encoder_adapter"
    alone(adapter, tmp_path / "clip", to="hf", part="vision", vision_tower=str(folder / "vision"))
    model, report = CLIPVisionModel.from_pretrained(tmp_path / "clip", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    base = CLIPVisionModel.from_pretrained(folder / "vision")
    name = "encoder.layers.0.mlp.fc1.weight"
    apart = dict(model.named_parameters())[name] - dict(base.named_parameters())[name]
    assert apart.abs().max() > 0.01 and (tmp_path / "clip" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize(
    "source",
    ["llava_v15/pretrain", "llava_v15/pretrain/mm_projector.bin", "xtuner_phi3/folder", "hf_llava_448/model"],
)
def test_a_projector_goes_from_one_project_to_the_other_and_back(source: str, tmp_path: Path) -> None:
    alone(ASSETS / source, tmp_path / "xtuner", to="xtuner", part="projector")
    alone(tmp_path / "xtuner", tmp_path / "llava", to="llava", part="projector")
    alone(tmp_path / "llava" / "mm_projector.bin", tmp_path / "again", to="xtuner", part="projector")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("xtuner", "again"))
    assert one.keys() == two.keys() == {f"model.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert all(torch.equal(one[name], two[name]) for name in one)
    saved = torch.load(tmp_path / "llava" / "mm_projector.bin", weights_only=True)
    assert all(torch.equal(saved[name.replace("model.", "model.mm_projector.", 1)], one[name]) for name in one)


def test_parts_of_a_whole_model_of_any_layout(tmp_path: Path) -> None:
    folder = make(tmp_path / "made", "llama3", "full")
    spec = ConvertSpec(template="llama3_chat")
    for to in ("hf", "gguf", "llava"):
        convert(folder / "trained", tmp_path / to, to=to, spec=spec)
        alone(tmp_path / to, tmp_path / f"{to}-llm", to="hf", part="llm")
        alone(tmp_path / to, tmp_path / f"{to}-vision", to="hf", part="vision")
    want = load_file(folder / "trained" / "model.safetensors")
    for to in ("gguf", "llava"):
        got = load_file(tmp_path / f"{to}-llm" / "model.safetensors")
        rows = {name: tensor[: len(want[name])].float() for name, tensor in got.items()}
        assert rows.keys() == want.keys() and all(torch.equal(rows[name], want[name].float()) for name in want)


@pytest.mark.parametrize(
    ("source", "to", "spec", "said"),
    [
        ("llava_v15/pretrain", "hf", {"part": "projector"}, "to=hf has no place for part=projector alone"),
        ("llava_v15/whole", "gguf", {"part": "llm"}, "to=gguf has no place for part=llm alone"),
        ("llava_v15/llm", "xtuner", {"part": "projector"}, "holds no projector"),
        ("llava_v15/lora", "hf", {"part": "llm"}, "holds no language model of its own; add --base DIR"),
    ],
)
def test_a_part_that_cannot_be_is_refused(
    source: str, to: str, spec: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        convert(ASSETS / source, tmp_path / "out", to=to, spec=ConvertSpec(**spec))
    assert not (tmp_path / "out").exists()
