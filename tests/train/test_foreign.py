"""A run starts from checkpoints of other projects: with exactly their weights, and their logits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayllava import recipe as recipes
from rayllava.checkpoint.run import Origin, RunManifest
from rayllava.durable import digest
from rayllava.model.build import initial
from rayllava.model.foreign import origin_of
from rayllava.recipe import ModelSpec, Recipe
from rayllava.train import launch

ASSETS = Path(__file__).parents[1] / "assets"
LLAVA, INTERNLM2, LLAMA3 = ASSETS / "llava_v15", ASSETS / "xtuner_internlm2", ASSETS / "xtuner_llama3"
HF = ASSETS / "hf_llava_448" / "model"
PROJECTOR = "model.multi_modal_projector."

VICUNA = ModelSpec(llm=str(LLAVA / "llm"), vision=str(LLAVA / "vision"), family="vicuna")
INTERN = ModelSpec(llm=str(INTERNLM2 / "llm"), vision=str(INTERNLM2 / "vision"), family="internlm2")


def stage2(init_from: Path, shards: Path, out: Path, model: ModelSpec | None = None, *more: str) -> Recipe:
    made = recipes.override(
        recipes.load("tiny.finetune"), [f"data={shards}", f"out={out}", f"init_from={init_from}", *more]
    )
    return made.but(model=model, data=made.data.but(global_batch=10, atom=2))


def start(manifest: RunManifest) -> Any:
    return initial(manifest.recipe, manifest.processor, origin=manifest.origin)


def logits(llava: Any, manifest: RunManifest, golden: dict[str, np.ndarray]) -> Tensor:
    """Return the logits of the last 16 positions for the prompt of a golden file, whose pictures are -200 each."""
    ids: list[int] = []
    for one in golden["input_ids"][0].tolist():
        ids += [manifest.processor.image_token_id] * manifest.processor.num_image_tokens if one == -200 else [one]
    with torch.inference_mode():
        said = llava(input_ids=torch.tensor([ids]), pixel_values=torch.from_numpy(golden["pixel_values"]))
    return said.logits[:, -16:]


def golden(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "golden.npz") as file:
        return dict(file)


def off(got: Tensor, want: np.ndarray) -> float:
    return float(np.abs(got[..., : want.shape[-1]].numpy() - want).max())


def projector_of(llava: Any) -> dict[str, Tensor]:
    return {n.removeprefix(PROJECTOR): p for n, p in llava.named_parameters() if n.startswith(PROJECTOR)}


def xtuner_pretrain(folder: Path) -> Path:
    """Write what XTuner leaves of a stage 1, from a genuine checkpoint: its projector, and much that is no tensor."""
    from rayllava.checkpoint.torchfile import tensors

    trained = {n: t.read() for n, t in tensors(INTERNLM2 / "iter_4.pth").items() if n.startswith("projector.")}
    torch.save(
        {"meta": {"iter": 4}, "state_dict": trained, "message_hub": {"x": np.float64(1)}}, folder / "iter_4.pth"
    )
    return folder / "iter_4.pth"


def four(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        f"linear_{1 + layer // 2}.{kind}": tensors[f"{prefix}{layer}.{kind}"].float()
        for layer in (0, 2)
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("form", ["file", "folder", "renamed", "pth", "folder of a projector", "safetensors"])
def test_a_second_stage_begins_with_exactly_that_projector(form: str, dialogues: Path, tmp_path: Path) -> None:
    model, source = VICUNA, LLAVA / "pretrain"
    want = four(torch.load(source / "mm_projector.bin", weights_only=True), "model.mm_projector.")
    if form == "file":
        source = source / "mm_projector.bin"
    elif form == "renamed":
        source = Path(shutil.copyfile(source / "mm_projector.bin", tmp_path / "iter_9.pth"))
    elif form != "folder":
        model = INTERN
        want = four(load_file(INTERNLM2 / "trained.safetensors"), "projector.model.")
        source = INTERNLM2 / "folder" / "projector"
        if form == "pth":
            source = xtuner_pretrain(tmp_path)
        elif form == "safetensors":
            source = tmp_path / "projector.safetensors"
            save_file(
                {n: t for n, t in load_file(INTERNLM2 / "trained.safetensors").items() if n.startswith("proj")},
                source,
            )
    manifest = launch.prepare(stage2(source, dialogues, tmp_path / "run", model))
    llava = start(manifest)
    got = projector_of(llava)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    plain = initial(manifest.recipe.but(init_from=""), manifest.processor)
    rest = {n: p for n, p in plain.named_parameters() if not n.startswith(PROJECTOR)}
    assert all(torch.equal(p, rest[n]) for n, p in llava.named_parameters() if n in rest)


def test_llavas_checkpoints_give_llavas_logits(dialogues: Path, tmp_path: Path) -> None:
    want = golden(LLAVA)
    for form, bound in (("pretrain", 1e-4), ("lora", 1.4e-4)):  # as LLaVA's own model with and without its adapters
        manifest = launch.prepare(stage2(LLAVA / form, dialogues, tmp_path / form, VICUNA))
        assert manifest.origin and manifest.origin.layout == "llava"
        assert off(logits(start(manifest), manifest, want), want[f"{form}_logits_last16"]) <= bound


def test_xtuners_adapters_give_xtuners_logits(dialogues: Path, tmp_path: Path) -> None:
    want = golden(INTERNLM2)
    for form, key in (("iter_4.pth", "logits_last16"), ("folder", "folder_logits_last16")):
        manifest = launch.prepare(stage2(INTERNLM2 / form, dialogues, tmp_path / form / "run", INTERN))
        assert manifest.origin and manifest.origin.layout == "xtuner"
        assert off(logits(start(manifest), manifest, want), want[key]) <= 1e-4


def llama3(folder: Path) -> ModelSpec:
    """Write the language model that XTuner's training began with, its weights drawn anew; they are all replaced."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(LLAMA3 / "llm", folder)
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copyfile(LLAMA3 / "llm" / name, folder / name)
    return ModelSpec(llm=str(folder), vision=str(LLAMA3 / "vision"), family="llama3")


def test_a_whole_language_model_replaces_the_parts(dialogues: Path, tmp_path: Path) -> None:
    model, want = llama3(tmp_path / "llm"), golden(LLAMA3)
    made = stage2(LLAMA3 / "iter_4.pth", dialogues, tmp_path / "run", model)
    manifest = launch.prepare(made.but(prompt=made.prompt.but(template="llama3_chat")))
    llava = start(manifest)
    assert off(logits(llava, manifest, want), want["logits_last16"]) <= 1e-4
    table = llava.lm_head.weight
    assert table.shape[0] == 576 and torch.equal(
        table[:512], load_file(LLAMA3 / "trained.safetensors")["llm.lm_head.weight"]
    )


def hf_logits(llava: Any, ids: str) -> Tensor:
    with np.load(HF.parent / "golden.npz") as file:
        given, pixels = torch.from_numpy(file[ids]), torch.from_numpy(file["pixel_values"])
    with torch.inference_mode():
        return llava(input_ids=given, pixel_values=pixels).logits


def test_a_whole_model_needs_no_parts(dialogues: Path, tmp_path: Path) -> None:
    from rayllava.checkpoint.layouts import LAYOUTS

    manifest = launch.prepare(stage2(HF, dialogues, tmp_path / "run"))
    assert manifest.recipe.model == ModelSpec(llm=str(HF), vision=str(HF), family="vicuna")
    assert (manifest.processor.image_token_id, manifest.processor.pad_token_id) == (512, 513)
    llava = start(manifest)
    want = {name: tensor.float() for name, tensor in LAYOUTS["hf"].read(HF).tensors()}
    got = llava.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    with np.load(HF.parent / "golden.npz") as file:
        assert off(hf_logits(llava, "input_ids"), file["logits"]) <= 1e-4


def test_a_whole_model_lies_over_the_parts_that_are_given(dialogues: Path, tmp_path: Path) -> None:
    manifest = launch.prepare(stage2(HF, dialogues, tmp_path / "run", VICUNA))
    llava = start(manifest)
    with np.load(HF.parent / "golden.npz") as file:
        assert off(hf_logits(llava, "input_ids")[..., :512], file["logits"][..., :512]) <= 1e-4
    assert llava.num_own_rows == 512


def pth(folder: Path, **changes: Tensor | None) -> Path:
    """Write XTuner's checkpoint of a stage 1 with tensors changed, added, or (None) left out."""
    trained = {n: t for n, t in load_file(INTERNLM2 / "trained.safetensors").items() if n.startswith("projector.")}
    trained |= {name.replace("__", "."): tensor for name, tensor in changes.items()}  # type: ignore[dict-item]
    torch.save({"state_dict": {n: t for n, t in trained.items() if t is not None}}, folder / "iter_1.pth")
    return folder / "iter_1.pth"


MISFITS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "another tower": (
        {"projector__model__0__weight": torch.zeros(48, 64)},
        r"projector.model.0.weight is \(48, 64\); the model has \(48, 32\); set model.llm, model.vision and a",
    ),
    "another llm": (
        {"projector__model__2__bias": torch.zeros(64)},
        r"projector.model.2.bias is \(64,\); the model has \(48,\); set model.llm",
    ),
    "a deeper projector": (
        {"projector__model__4__weight": torch.zeros(48, 48)},
        r"projector.model.4.weight is \(48, 48\); the model has no such tensor; set .* a projector of two layers",
    ),
    "a shallow projector": (
        {"projector__model__2__weight": None, "projector__model__2__bias": None},
        r"lacks model.multi_modal_projector.linear_2.weight \(48, 48\), but not the rest of it; set",
    ),
    "half an llm": (
        {"llm__model__norm__weight": torch.zeros(48)},
        r"lacks model.language_model.embed_tokens.weight \(576, 48\), but not the rest of it; set model.llm",
    ),
    "another llm's blocks": (
        {"llm__model__layers__0__attention__wqkv__weight": torch.zeros(96, 40)},
        r"wqkv.weight is \(96, 40\), of which model.language_model.* is \(48, 40\); the model has \(48, 48\); set",
    ),
    "another llm's heads": (
        {"llm__model__layers__0__attention__wqkv__weight": torch.zeros(90, 48)},
        r"wqkv.weight \(90, 48\) cannot be taken apart as internlm2 says; set model.llm",
    ),
    "another tower's positions": (
        {"visual_encoder__vision_model__embeddings__position_embedding__weight": torch.zeros(5, 32)},
        r"position_embedding.weight is \(5, 32\); the model has \(17, 32\); set model.vision and model.image_size",
    ),
    "adapters of unknown scale": (
        {"llm__base_model__model__output__lora_A__default__weight": torch.zeros(4, 48)},
        r"holds one half of the adapter on 'output'|does not say llm_lora.lora_alpha; give the folder",
    ),
    "something else": ({"head__weight": torch.zeros(2)}, r"holds 'head.weight', which is no part of a LLaVA"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_named_before_anything_is_written(name: str, dialogues: Path, tmp_path: Path) -> None:
    changes, said = MISFITS[name]
    with pytest.raises(ValueError, match=said) as caught:
        launch.prepare(stage2(pth(tmp_path, **changes), dialogues, tmp_path / "run", INTERN))
    assert "iter_1.pth" in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "run").rglob("*"))


def test_another_vocabulary_does_not_fit(dialogues: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(HF, tmp_path / "hf"))
    weights = load_file(folder / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weights[name] = torch.zeros(700, 64)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight is \(700, 64\); the model has \(576, 64\); set model.llm"):
        launch.prepare(stage2(folder, dialogues, tmp_path / "run", VICUNA))


def test_a_start_that_is_none_is_named(dialogues: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "mp_rank_00_model_states.pt").touch()
    damaged = tmp_path / "damaged.bin"
    damaged.write_bytes((LLAVA / "pretrain" / "mm_projector.bin").read_bytes()[:-100])
    for source, model, said in [
        (tmp_path / "none", VICUNA, r"init_from=.*none does not exist here; give a run or a checkpoint"),
        (tmp_path / "empty", VICUNA, r"init_from=.*empty is no run, nor a model in a layout .*: hf, llava, xtuner"),
        (tmp_path / "zero", VICUNA, r"init_from=.*zero is in DeepSpeed's pieces; give the folder that `xtuner conv"),
        (damaged, VICUNA, r"damaged.bin cannot be read: File is not a zip file"),
        (LLAVA / "pretrain", None, r"does not say what model it belongs to; add model.llm=DIR model.vision=DIR"),
    ]:
        with pytest.raises(ValueError, match=said):
            launch.prepare(stage2(source, dialogues, tmp_path / "run", model))
    with pytest.raises(ValueError, match=r"init_from=s3://bucket/x is no run .*; copy it to one that all workers"):
        origin_of("s3://bucket/x")


def test_a_start_that_changed_is_no_start(dialogues: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(LLAVA / "pretrain", tmp_path / "pretrain"))
    made = stage2(source, dialogues, tmp_path / "run", VICUNA)
    manifest = launch.prepare(made)
    assert manifest.origin == Origin(
        path=str(source), layout="llava", files={"mm_projector.bin": digest(source / "mm_projector.bin")}
    )
    assert launch.prepare(made) == manifest
    tensors = torch.load(source / "mm_projector.bin", weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, source / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"init_from=.* changed since out=.*run began; give another out, or fresh"):
        launch.prepare(made)
    with pytest.raises(ValueError, match=r"mm_projector.bin is gone or changed since the run began; put it back"):
        start(manifest)
    shutil.rmtree(source)
    with pytest.raises(ValueError, match=r"is not seen on this node; it must lie where all workers can read it"):
        start(manifest)
