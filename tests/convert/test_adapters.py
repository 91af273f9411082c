"""Adapters stay apart where a layout has a place for them, and are merged into whatever they were trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rayllava.convert.run import convert
from tests.convert.sources import ASSETS, SOURCES, asked


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("xtuner pth of adapters", "xtuner"),
        ("xtuner adapters", "xtuner"),
        ("xtuner pth", "xtuner"),
        ("llava lora", "xtuner"),
        ("llava lora", "llava"),
    ],
)
def test_adapters_may_stay_apart(name: str, to: str, tmp_path: Path) -> None:
    source = SOURCES[name]
    spec = asked(source, keep_adapters=True)
    proof = convert(ASSETS / source.path, tmp_path / "out", to=to, spec=spec)
    assert proof["proved"] and proof["bit_equal"], proof
    again = spec.but(keep_adapters=False)
    lacking = again.but(base="") if name == "xtuner pth" else again  # its language model was trained as a whole
    lacking = lacking.but(vision_tower="") if to == "llava" else lacking  # it lies beside
    merged = convert(tmp_path / "out", tmp_path / "hf", to="hf", spec=lacking)
    assert merged["proved"]
    want = convert(ASSETS / source.path, tmp_path / "want", to="hf", spec=again)
    assert want["proved"]
    one, two = (load_file(tmp_path / path / "model.safetensors") for path in ("hf", "want"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_kept_adapters_are_those_of_xtuners_own_folder(tmp_path: Path) -> None:
    source = SOURCES["xtuner pth of adapters"]
    convert(ASSETS / source.path, tmp_path / "out", to="xtuner", spec=asked(source, keep_adapters=True))
    folder = ASSETS / "xtuner_internlm2" / "folder"
    for name in ("llm_adapter", "visual_encoder_adapter"):
        got, want = (load_file(path / name / "adapter_model.safetensors") for path in (tmp_path / "out", folder))
        assert got.keys() == want.keys()
        # XTuner rounds the language model's to float16.
        assert all(torch.equal(got[key].to(tensor.dtype), tensor) for key, tensor in want.items())
        said, theirs = (
            json.loads((path / name / "adapter_config.json").read_text()) for path in (tmp_path / "out", folder)
        )
        for key in ("r", "lora_alpha", "task_type", "peft_type", "bias", "use_rslora"):
            assert said[key] == theirs[key], key
        assert sorted(said["target_modules"]) == sorted(theirs["target_modules"])


@pytest.mark.parametrize(
    ("name", "to", "said"),
    [
        ("xtuner whole", "xtuner", "SRC holds no adapters; leave --keep-adapters out"),
        ("llava lora", "hf", "to=hf has no place for adapters apart from their weights"),
        ("llava lora", "gguf", "to=gguf has no place for adapters apart from their weights"),
        (
            "xtuner adapters",
            "llava",
            r"adapters on a Llama, which has no model.layers.0.attention.w\w+ as these have",
        ),
        ("xtuner pth", "llava", "SRC holds no adapters on its language model"),
    ],
)
def test_adapters_that_have_no_place_apart_are_refused(name: str, to: str, said: str, tmp_path: Path) -> None:
    source = SOURCES[name]
    with pytest.raises(ValueError, match=said):
        convert(ASSETS / source.path, tmp_path / "out", to=to, spec=asked(source, keep_adapters=True))
    assert list(tmp_path.iterdir()) == []


def test_adapters_on_a_whole_llava_are_merged_into_it(tmp_path: Path) -> None:
    source = SOURCES["llava lora"]
    spec = asked(source, dtype="float32")
    convert(ASSETS / source.path, tmp_path / "one", to="llava", spec=spec)
    again = spec.but(base=str(tmp_path / "one"))
    proof = convert(ASSETS / source.path, tmp_path / "two", to="hf", spec=again)
    assert proof["proved"], proof
    one, two = (load_file(tmp_path / path / "model.safetensors") for path in ("one", "two"))
    own = load_file(ASSETS / "llava_v15" / "llm" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    twice = two[f"language_model.{name}"] - one[name]
    assert (twice - (one[name] - own[name].float())).abs().max() < 1e-5 < twice.abs().max()
