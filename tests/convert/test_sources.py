"""Checkpoints of LLaVA and XTuner become Hugging Face folders that compute what their own projects computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rayllava.checkpoint.layouts import LAYOUTS, detect
from rayllava.checkpoint.manifest import read_model_manifest
from rayllava.convert.run import ConvertSpec, convert
from rayllava.model.restore import restore
from tests.checkpoint.hub_server import Hub
from tests.convert.sources import ASSETS, SOURCES, asked
from tests.convert.test_convert import job


@pytest.mark.parametrize("name", SOURCES)
def test_logits_are_those_of_the_project_that_wrote_it(name: str, tmp_path: Path) -> None:
    source = SOURCES[name]
    path = ASSETS / source.path
    assert detect(path) == source.layout
    proof = convert(path, tmp_path / "hf", to="hf", spec=asked(source, dtype="float32"))
    assert proof["proved"] and proof["bit_equal"] and proof["from"] == source.layout, proof
    spec = read_model_manifest(tmp_path / "hf").processor
    model = restore(LAYOUTS["hf"].read(tmp_path / "hf"), dtype=torch.float32)
    with np.load(path.parent / "golden.npz") as file:
        want = dict(file)
    if path.parent.name == "llava_v15":
        with np.load(path.parent / "pixels.npz") as file:
            want["two_pixel_values"] = file["two_pixel_values"]
    cases = [("", 16), ("two_", 8), ("text_", 8)]
    cases = [case for case in cases if f"{source.golden}{case[0]}logits_last{case[1]}" in want]
    assert len(cases) == source.cases
    for case, last in cases:
        logits = want[f"{source.golden}{case}logits_last{last}"]
        runs = [
            [spec.image_token_id] * spec.num_image_tokens if i == -200 else [i] for i in want[f"{case}input_ids"][0]
        ]
        pixels = None if case == "text_" else torch.from_numpy(want[f"{case}pixel_values"])
        with torch.inference_mode():
            seen = model(input_ids=torch.tensor([[id_ for run in runs for id_ in run]]), pixel_values=pixels).logits
        got = seen[:, -last:, : logits.shape[-1]].numpy()
        assert np.abs(got - logits).max() <= source.bound, case or "one picture"


@pytest.mark.parametrize("name", ["llava lora", "xtuner pth", "xtuner whole"])
def test_tensors_keep_their_types(name: str, tmp_path: Path) -> None:
    source = SOURCES[name]
    proof = convert(ASSETS / source.path, tmp_path / "hf", to="hf", spec=asked(source))
    assert proof["proved"] and proof["bit_equal"], proof
    written = load_file(tmp_path / "hf" / "model.safetensors")
    llm = {tensor.dtype for key, tensor in written.items() if key.startswith("language_model.")}
    rest = {tensor.dtype for key, tensor in written.items() if key.startswith("multi_modal_projector.")}
    wanted = {"xtuner pth": (torch.float32, torch.float32), "xtuner whole": (torch.float16, torch.float32)}
    assert (llm, rest) == tuple({each} for each in wanted.get(name, (torch.float16, torch.float16)))


def test_xtuners_own_hugging_face_folder_is_read_with_what_it_forgot_to_say(tmp_path: Path) -> None:
    asset = ASSETS / "xtuner_llama3"
    assert detect(asset / "expected_hf") == "hf"
    proof = convert(asset / "expected_hf", tmp_path / "hf", to="hf", spec=ConvertSpec(template="llama3_chat"))
    assert proof["proved"], proof
    stored = LAYOUTS["hf"].read(tmp_path / "hf")
    assert stored.num_own_rows == 512  # <unk>, <image> and <pad> were added
    with np.load(asset / "golden.npz") as file, torch.inference_mode():
        ids, want = torch.from_numpy(file["expected_hf_input_ids"]), file["expected_hf_logits_last8"]
        pixels = torch.from_numpy(file["pixel_values"])
        got = restore(stored, dtype=torch.float32)(input_ids=ids, pixel_values=pixels).logits[:, -8:].numpy()
    assert np.abs(got - want).max() <= 1e-4


@pytest.mark.parametrize(
    ("source", "to", "expected"),
    [
        ("xtuner half adapters", "hf", "xtuner_llama3/expected_hf"),
        ("xtuner half adapters", "llava", "xtuner_llama3/expected_official"),
    ],
)
def test_tensors_are_those_of_xtuners_own_exports(source: str, to: str, expected: str, tmp_path: Path) -> None:
    convert(ASSETS / SOURCES[source].path, tmp_path / "out", to=to, spec=asked(SOURCES[source]))
    got = load_file(tmp_path / "out" / "model.safetensors")
    want = load_file(ASSETS / expected / "model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        ours = got[name][:512] if "embed_tokens" in name or "lm_head" in name else got[name]
        theirs = tensor[:512] if "embed_tokens" in name or "lm_head" in name else tensor
        assert ours.dtype == theirs.dtype and (ours - theirs).abs().max() <= 1e-6, name


def test_a_phi3_is_taken_apart_as_xtuner_does_it(tmp_path: Path) -> None:
    source = SOURCES["xtuner whole"]
    convert(ASSETS / source.path, tmp_path / "llava", to="llava", spec=asked(source))
    got = load_file(tmp_path / "llava" / "model.safetensors")
    files = sorted((ASSETS / "xtuner_phi3" / "expected_llama").glob("*.safetensors"))
    want = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(want) == 21 and all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_added_rows_are_the_mean_of_the_old_ones(tmp_path: Path) -> None:
    source = SOURCES["llava whole"]
    convert(ASSETS / source.path, tmp_path / "hf", to="hf", spec=asked(source))
    table = load_file(tmp_path / "hf" / "model.safetensors")["language_model.model.embed_tokens.weight"]
    own = load_file(ASSETS / source.path / "model.safetensors")["model.embed_tokens.weight"]
    assert len(table) == 576 and torch.equal(table[:512], own)
    assert torch.equal(table[512:], own.float().mean(0).half().expand(64, -1))


def test_a_smaller_tower_is_fitted_to_larger_pictures(tmp_path: Path) -> None:
    source = SOURCES["llava projector"]
    parts = (ASSETS / source.path).parent
    vision = shutil.copytree(parts / "vision", tmp_path / "vision")
    said = json.loads((vision / "preprocessor_config.json").read_text())
    said |= {"size": {"shortest_edge": 84}, "crop_size": {"height": 84, "width": 84}}
    (vision / "preprocessor_config.json").write_text(json.dumps(said))
    spec = asked(source).but(vision_tower=str(vision))
    proof = convert(ASSETS / source.path, tmp_path / "hf", to="hf", spec=spec)
    assert proof["proved"], proof
    assert read_model_manifest(tmp_path / "hf").processor.num_image_tokens == 36
    written = load_file(tmp_path / "hf" / "model.safetensors")
    grid = written["vision_tower.vision_model.embeddings.position_embedding.weight"]
    old = load_file(vision / "model.safetensors")
    table = next(tensor for key, tensor in old.items() if key.endswith("position_embedding.weight"))
    assert grid.shape[0] == 37 and torch.equal(grid[0], table[0])


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llava lora", {"base": ""}, "holds no language model of its own; add --base DIR"),
        ("llava whole", {"base": "x"}, "holds its language model whole; leave --base out"),
        ("xtuner whole", {"vision_tower": "x"}, "holds its vision tower whole; leave --vision-tower out"),
        ("xtuner pth", {"vision_tower": ""}, "does not name its vision tower; add --vision-tower DIR"),
        ("llava whole", {"vision_tower": ""}, "names a vision tower that is not here: --vision-tower=clip-vit-tiny"),
        ("llava lora", {"base": "/none"}, "--base=/none does not exist; give a model folder or a hub id"),
        ("llava lora", {"template": None}, "does not say how its model is asked; add template=NAME"),
        (
            "llava lora",
            {"base": "xtuner_llama3"},
            r"SRC=.*lora: .* adds \(64, 128\) to \(48, 128\); give as --base the language model",
        ),
    ],
)
def test_what_is_missing_is_said_before_anything_is_written(
    name: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    source = SOURCES[name]
    if changes.get("base") == "xtuner_llama3":  # another language model than it was trained from
        llm = shutil.copytree(ASSETS / "xtuner_llama3" / "llm", tmp_path / "llm")
        trained = load_file(ASSETS / "xtuner_llama3" / "trained.safetensors")
        save_file(
            {k.removeprefix("llm."): t for k, t in trained.items() if k.startswith("llm.")}, llm / "model.safetensors"
        )
        changes = {"base": str(llm)}
    with pytest.raises(ValueError, match=said):
        convert(ASSETS / source.path, tmp_path / "out", to="hf", spec=asked(source).but(**changes))
    assert not (tmp_path / "out").exists()


def test_the_job_takes_parts_by_flags(tmp_path: Path) -> None:
    parts = ASSETS / "llava_v15"
    flags = ["--base", str(parts / "llm"), "--vision-tower", str(parts / "vision")]
    done = job(
        "jobs/convert.py", str(parts / "lora"), str(tmp_path / "hf"), "--to", "hf", *flags, "template=vicuna_v1"
    )
    assert done.returncode == 0, done.stderr
    assert "proved in" in done.stdout


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("llava_v15/whole", ["--conv-mode", "vicuna_v1", "vision_tower=llava_v15/vision", "--load-4bit"]),
        (
            "xtuner_internlm2/llm",
            [
                *("--llava", "xtuner_internlm2/folder", "--visual-encoder", "xtuner_internlm2/vision"),
                *("--prompt-template", "internlm2_chat"),
            ],
        ),
        ("gguf_llava/llava-tiny-f16.gguf", ["template=vicuna_v1", "quant=int8"]),
    ],
)
def test_the_chat_takes_any_layout(path: str, words: list[str], tmp_path: Path) -> None:
    said = [
        word if "/" not in word else word.replace("=", f"={ASSETS}/") if "=" in word else f"{ASSETS}/{word}"
        for word in words
    ]
    if path.endswith(".gguf"):  # beside one mmproj file
        for name in (path, "gguf_llava/mmproj-f16.gguf"):
            shutil.copyfile(ASSETS / name, tmp_path / Path(name).name)
        path = str(tmp_path / Path(path).name)
    picture = str(ASSETS / "llava_v15" / "image.png")
    lines = f"/image {picture}\nWhat is shown?\nAnd here?\n/quit\nNever?\n"
    done = job("jobs/chat.py", str(ASSETS / path), *said, "--image", picture, "max_new_tokens=5", input=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 for the next question\n") and done.stdout.count("\n") >= 3


def test_a_whole_model_beside_a_projector_is_read_whole(tmp_path: Path) -> None:
    source = SOURCES["llava tuned"]
    folder = shutil.copytree(ASSETS / source.path, tmp_path / "llava")
    shutil.copyfile(ASSETS / "llava_v15" / "pretrain" / "mm_projector.bin", folder / "mm_projector.bin")
    spec = asked(source).but(vision_tower=str(ASSETS / "llava_v15" / "vision"))
    for path, name in ((ASSETS / source.path, "want"), (folder, "got")):
        assert convert(path, tmp_path / name, to="hf", spec=spec)["proved"]
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("want", "got"))
    assert all(torch.equal(want[key], got[key]) for key in want)


def test_old_readers_find_what_they_know(tmp_path: Path) -> None:
    """What transformers 4.37 and its tokenizers want, which LLaVA's own code pins."""
    for name, to in (("llava whole", "llava"), ("llava of xtuner", "llava"), ("xtuner whole", "hf")):
        folder = tmp_path / name.replace(" ", "-")
        convert(ASSETS / SOURCES[name].path, folder, to=to, spec=asked(SOURCES[name]))
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        assert all(isinstance(merge, str) for merge in tokenizer["model"]["merges"])
        cut = tokenizer["pre_tokenizer"]
        if cut and cut["type"] == "Metaspace":
            assert cut["add_prefix_space"] is True and cut["prepend_scheme"] == "first"
        config = json.loads((folder / "config.json").read_text())
        text = config.get("text_config", config)
        assert "auto_map" not in text and "rope_theta" in text
        assert text["architectures"] == {"llava": ["LlavaLlamaForCausalLM"], "hf": ["Phi3ForCausalLM"]}[to]


def test_a_template_of_another_family_is_refused(tmp_path: Path) -> None:
    source = SOURCES["xtuner whole"]
    with pytest.raises(ValueError, match="holds a language model of type phi3, which is not of family vicuna"):
        convert(ASSETS / source.path, tmp_path / "out", to="hf", spec=ConvertSpec(template="vicuna_v1"))
    assert not (tmp_path / "out").exists()


def test_a_base_may_be_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Hub("acme/llm", ASSETS / "llava_v15" / "llm", commit="1" * 40)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    source = SOURCES["llava lora"]
    try:
        proof = convert(ASSETS / source.path, tmp_path / "hf", to="hf", spec=asked(source).but(base="acme/llm"))
    finally:
        server.stop()
    assert proof["proved"], proof
    assert read_model_manifest(tmp_path / "hf").parts["llm"] == "acme/llm"
    assert "`acme/llm`" in (tmp_path / "hf" / "README.md").read_text()
