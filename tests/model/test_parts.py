"""Parts in their own projects' folders compute what those projects' code computes, at other picture sizes too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from rayllava.model.parts import language_model, vision_tower
from tests.model.kinds import TEXT, as_internlm2, model_of


def written(llm: str, tower: str, folder: Path) -> tuple[Path, Path]:
    spec = model_of(llm, tower, folder, folder)
    return Path(spec.llm), Path(spec.vision)


def pixels(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def intern_vit(folder: Path, pictures: Tensor) -> list[Tensor]:
    """Return the hidden states of OpenGVLab's InternVisionModel, written anew from its description."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    patch, heads = config["patch_size"], config["num_attention_heads"]

    def norm(x: Tensor, name: str) -> Tensor:
        return tensors[name] * x / (x.square().mean(-1, keepdim=True) + config["layer_norm_eps"]).sqrt()

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    at = "embeddings.patch_embedding"
    grid = F.conv2d(pictures, tensors[f"{at}.weight"], tensors[f"{at}.bias"], stride=patch)
    places = tensors["embeddings.position_embedding"][:, 1:]
    side = math.isqrt(places.shape[1])
    places = places.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    places = F.interpolate(places, size=grid.shape[2:], mode="bicubic", align_corners=False)
    words = (grid + places).flatten(2).transpose(1, 2)
    first = tensors["embeddings.class_embedding"] + tensors["embeddings.position_embedding"][:, :1]
    x = torch.cat([first.expand(len(pictures), -1, -1), words], dim=1)
    states = [x]
    for number in range(config["num_hidden_layers"]):
        block = f"encoder.layers.{number}"
        q, k, v = linear(norm(x, f"{block}.norm1.weight"), f"{block}.attn.qkv").chunk(3, dim=-1)
        q, k = norm(q, f"{block}.attn.q_norm.weight"), norm(k, f"{block}.attn.k_norm.weight")
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
        seen = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + tensors[f"{block}.ls1"] * linear(seen.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        inner = F.gelu(linear(norm(x, f"{block}.norm2.weight"), f"{block}.mlp.fc1"))
        x = x + tensors[f"{block}.ls2"] * linear(inner, f"{block}.mlp.fc2")
        states.append(x)
    return states


@pytest.mark.parametrize("size", [28, 42, 56])
def test_an_intern_vit_gives_the_hidden_states_of_its_own_code(size: int, tmp_path: Path) -> None:
    _, folder = written("vicuna", "intern_vit_6b", tmp_path)
    tower = vision_tower(folder, size=size).eval()
    with torch.no_grad():
        want = intern_vit(folder, pixels(size))
        got = tower(pixels(size), output_hidden_states=True).hidden_states
    assert len(got) == len(want) == 6
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert list(tower.config.image_size) == [size, size]


@pytest.mark.parametrize("kind", ["clip", "siglip", "internvl_vision"])
def test_a_tower_at_another_size_is_what_transformers_interpolates(kind: str, tmp_path: Path) -> None:
    _, folder = written("vicuna", kind, tmp_path)
    native, larger = vision_tower(folder, size=28).eval(), vision_tower(folder, size=56).eval()
    interpolate = {} if kind == "internvl_vision" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        want = native(pixels(56), output_hidden_states=True, **interpolate).hidden_states
        got = larger(pixels(56), output_hidden_states=True).hidden_states
    assert len(got) == len(want) and torch.allclose(got[-2], want[-2], atol=1e-5)
    assert not torch.allclose(got[-1], got[-2], atol=1e-2)


def test_a_whole_clip_gives_its_vision_half(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    _, folder = written("vicuna", "clip", tmp_path)
    want = load_file(folder / "model.safetensors")
    picture = json.loads((folder / "config.json").read_text())
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for number, (config, model) in enumerate([(CLIPConfig, CLIPModel), (SiglipConfig, SiglipModel)]):
        whole: Any = model(config(vision_config=picture, text_config=small | {"vocab_size": 50}))
        whole.save_pretrained(tmp_path / str(number))
        tower = vision_tower(tmp_path / str(number), size=28)
        assert all(torch.equal(t, tower.state_dict()[n]) for n, t in whole.vision_model.state_dict().items())
    assert len(want) > 50


def test_internlm_keeps_every_tensor_and_its_biases(tmp_path: Path) -> None:
    folder, _ = written("internlm", "clip", tmp_path)
    model = language_model(folder, family="internlm")
    want = load_file(folder / "model.safetensors")
    assert {name.rpartition(".")[0] for name in want if name.endswith(".bias")} == {
        f"model.layers.{number}.self_attn.{x}_proj" for number in range(2) for x in "qkvo"
    }
    got = model.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert model.config.rope_parameters["rope_theta"] == 10000 and model.config.num_key_value_heads == 4


def test_internlm2_is_a_llama_whose_rows_were_grouped_by_key_head(tmp_path: Path) -> None:
    folder, _ = written("internlm2", "clip", tmp_path)
    model = language_model(folder, family="internlm2")
    want = load_file(folder / "model.safetensors")
    again = as_internlm2(model.state_dict())
    assert again.keys() == want.keys() and all(torch.equal(again[name], want[name]) for name in want)
    q = model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(q, want["model.layers.0.attention.wqkv.weight"][: len(q)]), "three blocks would be wrong"
    assert model.config.rope_parameters["rope_theta"] == 1e6 and TEXT["num_key_value_heads"] == 2


def test_a_family_that_does_not_fit_is_named_with_one_that_does(tmp_path: Path) -> None:
    folder, _ = written("phi3", "clip", tmp_path)
    with pytest.raises(ValueError, match=r"model.family=vicuna does not fit .* of type phi3; use one of phi3"):
        language_model(folder, family="vicuna")


def test_incomplete_weights_are_named(tmp_path: Path) -> None:
    llm, tower = written("internlm2", "clip", tmp_path)
    tensors = load_file(llm / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, llm / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.llm=.* has 1 missing keys, model.norm.weight first; give a whole"):
        language_model(llm, family="internlm2")
    for folder, read in ((llm, lambda: language_model(llm, family="internlm2")), (tower, lambda: vision(tower))):
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"holds neither model.safetensors nor pytorch_model.bin; give a folder"):
            read()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("llm", "tower"), [("vicuna", "clip"), ("internlm2", "intern_vit_6b"), ("phi3", "siglip"), ("qwen2", "clip")]
)
def test_weights_of_torch_make_the_same_parts(llm: str, tower: str, sharded: bool, tmp_path: Path) -> None:
    folders = written(llm, tower, tmp_path)
    reads = [lambda: language_model(folders[0], family=llm), lambda: vision(folders[1])]
    want = [read().state_dict() for read in reads]
    for folder in folders:
        as_torch_saves(folder, sharded=sharded)
    for read, state in zip(reads, want, strict=True):
        got = read().state_dict()
        assert got.keys() == state.keys() and all(torch.equal(got[name], state[name]) for name in state)


def as_torch_saves(folder: Path, *, sharded: bool) -> None:
    """Put files of torch.save in the place of a folder's safetensors, under the names of older transformers."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] in ("clip_vision_model", "siglip_vision_model"):
        weights = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in weights.items()}
        weights["vision_model.embeddings.position_ids"] = torch.arange(5).expand(1, -1)
    if not sharded:
        torch.save(weights, folder / "pytorch_model.bin")
        return
    names = sorted(weights)
    halves = {f"pytorch_model-{n + 1:05d}-of-00002.bin": names[n::2] for n in range(2)}
    for number, (file, some) in enumerate(halves.items()):
        chosen = {name: weights[name] for name in some}
        torch.save(chosen, folder / file, _use_new_zipfile_serialization=bool(number))
    index = {"weight_map": {name: file for file, some in halves.items() for name in some}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_safetensors_go_before_what_torch_saved(tmp_path: Path) -> None:
    llm, _ = written("vicuna", "clip", tmp_path)
    torch.save({"lm_head.weight": torch.zeros(1)}, llm / "pytorch_model.bin")
    want = load_file(llm / "model.safetensors")["lm_head.weight"]
    assert torch.equal(language_model(llm, family="vicuna").lm_head.weight, want)


@pytest.mark.parametrize("listed", ["../other.bin", "missing.bin", None])
def test_an_index_names_files_of_its_folder(listed: str | None, tmp_path: Path) -> None:
    llm, _ = written("vicuna", "clip", tmp_path)
    as_torch_saves(llm, sharded=True)
    torch.save({"a": torch.ones(1)}, tmp_path / "other.bin")
    path = llm / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {"a": listed} if listed else []
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model.llm=.*(names files outside|lacks missing.bin, which|is damaged)"):
        language_model(llm, family="vicuna")


def vision(folder: Path) -> Any:
    return vision_tower(folder, size=28)


def test_a_strange_tower_is_named_beside_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(
        ValueError,
        match=r"model.vision=.* is of type resnet, which is no tower here; there are: clip, .*intern_vit_6b",
    ):
        vision(tmp_path)
