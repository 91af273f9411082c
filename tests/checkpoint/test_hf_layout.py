"""The Hugging Face layout: what others wrote is read, what we write is read by others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rayllava.checkpoint import shards
from rayllava.checkpoint.layouts import LAYOUTS, StoredModel, _chat_words, detect, hf, write
from rayllava.checkpoint.manifest import ModelManifest, export_dir, read_model_manifest
from rayllava.durable import digest
from rayllava.model.restore import restore
from rayllava.prompt.chat import TEMPLATES, Round
from tests.generate.llava import tiny_llava
from tests.tiny import make_parts, processor_spec

ASSETS = Path(__file__).parents[1] / "assets"
HF = LAYOUTS["hf"]
MANIFEST = ModelManifest(processor=processor_spec(), family="vicuna", source="test")


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_parts(tmp_path_factory.mktemp("parts")).llm)


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(ASSETS / name / "golden.npz") as file:
        return dict(file)


@pytest.mark.parametrize(("name", "ids"), [("hf_llava_437", "expanded_input_ids"), ("hf_llava_448", "input_ids")])
def test_published_folders_give_their_own_logits(name: str, ids: str) -> None:
    want = golden(name)
    model = restore(HF.read(ASSETS / name / "model"), dtype=torch.float32)
    with torch.inference_mode():
        got = model(input_ids=torch.from_numpy(want[ids]), pixel_values=torch.from_numpy(want["pixel_values"])).logits
    assert np.abs(got.numpy() - want["logits"]).max() <= 1e-4


def test_two_pictures_give_the_published_logits() -> None:
    want = golden("hf_llava_448")
    model = restore(HF.read(ASSETS / "hf_llava_448" / "model"), dtype=torch.float32)
    with torch.inference_mode():
        got = model(
            input_ids=torch.from_numpy(want["two_input_ids"]), pixel_values=torch.from_numpy(want["two_pixel_values"])
        ).logits
    assert np.abs(got[:, -8:].numpy() - want["two_logits_last8"]).max() <= 1e-4


SPELLINGS: dict[str, Callable[[str], str]] = {
    "4.51": lambda name: hf.published(name, "clip_vision_model"),
    "4.52": lambda name: name.replace("model.vision_tower.", "model.vision_tower.vision_model."),
    "5 in memory": lambda name: name,
    "5 made in memory": lambda name: hf.published(name, "clip_vision_model").replace("vision_model.", ""),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_published_spelling_is_read_to_the_same_tensors(tmp_path: Path, spelling: str) -> None:
    source = ASSETS / "hf_llava_448" / "model"
    want = dict(HF.read(source).tensors())
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    tensors = {SPELLINGS[spelling](name): tensor for name, tensor in want.items()}
    old = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    save_file(tensors | old, tmp_path / "model.safetensors")
    got = dict(HF.read(tmp_path).tensors())
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_an_exported_folder_loads_in_plain_transformers(tmp_path: Path, tokenizer_dir: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    made = tiny_llava()
    folder = tmp_path / "export"
    manifest = write("hf", folder, StoredModel.of(made, tokenizer_dir, num_own_rows=330), MANIFEST)
    model, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    want = made.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    assert model.generation_config.eos_token_id == [2] and model.generation_config.bos_token_id == 1
    assert read_model_manifest(folder) == manifest and list(manifest.files) == ["model.safetensors"]
    assert detect(folder) == "hf"


def test_names_in_the_file_are_the_ones_every_reader_knows(tmp_path: Path, tokenizer_dir: Path) -> None:
    write("hf", tmp_path / "export", StoredModel.of(tiny_llava(), tokenizer_dir, num_own_rows=330), MANIFEST)
    names = set(load_file(tmp_path / "export" / "model.safetensors"))
    published = set(load_file(ASSETS / "hf_llava_448" / "model" / "model.safetensors"))
    assert names == published


def test_a_large_model_is_sharded_with_an_index(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlavaForConditionalGeneration

    made = tiny_llava()
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 200_000)
    manifest = write("hf", tmp_path / "export", StoredModel.of(made, tokenizer_dir, num_own_rows=330), MANIFEST)
    assert manifest.files == {name: digest(tmp_path / "export" / name) for name in manifest.files}
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in made.state_dict().values())
    assert set(index["weight_map"].values()) == set(manifest.files) and len(manifest.files) > 2
    want = made.state_dict()
    assert all(torch.equal(t, want[n]) for n, t in HF.read(tmp_path / "export").tensors())
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "export")
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())


def test_a_tied_head_is_left_out_and_tied_again(tmp_path: Path, tokenizer_dir: Path) -> None:
    made = tiny_llava(tie_word_embeddings=True)
    write("hf", tmp_path / "export", StoredModel.of(made, tokenizer_dir, num_own_rows=330), MANIFEST)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "export" / "model.safetensors")
    model = restore(HF.read(tmp_path / "export"), dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, made.lm_head.weight)


def test_transformers_4_finds_rope_and_dtype_where_it_looks(tmp_path: Path, tokenizer_dir: Path) -> None:
    rope = {"rope_theta": 500000.0, "rope_type": "default"}
    stored = StoredModel.of(tiny_llava(rope_parameters=rope), tokenizer_dir, num_own_rows=330).cast(torch.bfloat16)
    write("hf", tmp_path / "export", stored, MANIFEST)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["text_config"]["rope_theta"] == 500000.0
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "bfloat16"
    assert config["image_token_index"] == 330 and config["image_seq_length"] == 4
    read = HF.read(tmp_path / "export")
    assert read.config.text_config.rope_parameters == rope and read.dtype == torch.bfloat16


def test_a_model_of_another_shape_than_its_config_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    stored = StoredModel.of(tiny_llava(), tokenizer_dir, num_own_rows=330)
    stored.config.text_config.vocab_size = 400
    with pytest.raises(ValueError, match=r"embed_tokens.weight \(384, 64\) does not fit the config"):
        write("hf", tmp_path / "export", stored, MANIFEST)
    assert list(tmp_path.iterdir()) == []


def test_the_vocabulary_is_as_large_as_the_tensors_say(tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "hf_llava_437" / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["text_config"]["vocab_size"] += 64
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert HF.read(tmp_path / "model").config.text_config.vocab_size == 576


def test_a_published_folder_describes_its_prompt_path() -> None:
    folder = ASSETS / "hf_llava_448" / "model"
    spec = HF.describe(folder, HF.read(folder), template="vicuna_v1")
    assert (spec.image_size, spec.num_image_tokens, spec.aspect) == (56, 16, "crop")
    assert (spec.image_token_id, spec.pad_token_id, spec.bos_token_id, spec.stop_token_ids) == (512, 513, 1, (2,))


@pytest.mark.parametrize("name", _chat_words.TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_jinja_says_what_our_template_says(name: str, system: str | None) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    rounds = [Round('<image>\nWhat\'s "this"?', "A cat."), Round("Sure?", None)]
    spans = [span for spans in TEMPLATES[name].render(rounds, system=system) for span in spans]
    said = {"image": "<image>", "bos": "<s>", "eos": "</s>"}
    want = "".join(said.get(span.kind, span.text) for span in spans)
    parts = [{"type": "image"}, {"type": "text", "text": 'What\'s "this"?'}]
    dialogue = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    dialogue = [{"role": "system", "content": system}, *dialogue] if system else dialogue
    jinja = _chat_words.chat_template(name, bos_token="<s>" if TEMPLATES[name].bos == "once" else "")
    got, _ = render_jinja_template([dialogue], chat_template=jinja, add_generation_prompt=True)
    assert got == [want]


def test_a_folder_without_manifest_is_named_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no manifest.json; .*template=NAME"):
        read_model_manifest(ASSETS / "hf_llava_448" / "model")
    with pytest.raises(ValueError, match="is no folder"):
        read_model_manifest(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no model"):
        read_model_manifest(tmp_path)
    with pytest.raises(ValueError, match="layout that we read"):
        detect(tmp_path)


def test_a_run_means_its_export(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    assert export_dir(tmp_path) == tmp_path
    (tmp_path / "export" / "config.json").write_text("{}")
    assert export_dir(tmp_path) == tmp_path / "export"


def test_a_run_without_an_export_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{\n "format": 1,\n "kind": "run"\n}')
    with pytest.raises(ValueError, match="is a run without an export yet"):
        read_model_manifest(tmp_path)


def test_weights_of_torch_are_read_like_safetensors(tmp_path: Path) -> None:
    source = ASSETS / "hf_llava_448" / "model"
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    weights = load_file(source / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    want, stored = dict(HF.read(source).tensors()), HF.read(tmp_path)
    got = dict(stored.tensors())
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert stored.dtype == torch.float16
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"pytorch_model.bin cannot be read: it does not begin as one"):
        HF.read(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor pytorch_model.bin"):
        HF.read(tmp_path)


def test_a_whole_clip_is_no_llava(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip", "text_config": {}, "vision_config": {}}')
    with pytest.raises(ValueError, match="is no run, nor a model in a layout that we read"):
        detect(tmp_path)
