"""A run starts from checkpoints of other projects: with exactly their weights, and their logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayllava.checkpoint.layouts import LAYOUTS, write
from rayllava.checkpoint.lease import Lease
from rayllava.checkpoint.ledger import LedgerEntry
from rayllava.checkpoint.manifest import ModelManifest
from rayllava.checkpoint.run import RunManifest
from rayllava.checkpoint.saver import Saver
from rayllava.checkpoint.store import Store, decide
from rayllava.checkpoint.torchfile import tensors
from rayllava.model.build import initial
from rayllava.place import Place
from rayllava.recipe import ModelSpec
from rayllava.train import launch
from tests.train.starts import HF, INTERN, INTERNLM2, LLAMA3, LLAVA, VICUNA, stage2, start

PROJECTOR = "model.multi_modal_projector."


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


def test_an_export_of_ours_says_its_family(dialogues: Path, tmp_path: Path) -> None:
    layout, stored = LAYOUTS["hf"], LAYOUTS["hf"].read(HF)
    spec = layout.describe(HF, stored, template="llava_v1")
    write("hf", tmp_path / "export", stored, ModelManifest(processor=spec, family="llama2", source="test"))
    manifest = launch.prepare(stage2(tmp_path / "export", dialogues, tmp_path / "run"))
    assert manifest.recipe.model and manifest.recipe.model.family == "llama2"


@pytest.mark.parametrize("tuned", [False, True])
def test_llavas_tower_counts_where_it_was_trained(tuned: bool, dialogues: Path, tmp_path: Path) -> None:
    stored, folder = LAYOUTS["hf"].read(HF), tmp_path / "llava"
    tower = {n: t for n, t in stored.tensors() if n.startswith("model.vision_tower.")}
    theirs = {
        **{n.replace("model.language_model.", "model."): t for n, t in stored.tensors() if "language_model" in n},
        "lm_head.weight": dict(stored.tensors())["lm_head.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        **{n.replace("tower.", "tower.vision_tower.vision_model.", 1): t + 1 for n, t in tower.items()},
    }
    theirs |= {n: t[:512] for n, t in theirs.items() if n in ("model.embed_tokens.weight", "lm_head.weight")}
    for name, tensor in stored.tensors():
        if name.startswith(PROJECTOR):
            layer = {"1": "0", "2": "2"}[name.removeprefix(PROJECTOR)[7]]
            theirs[f"model.mm_projector.{layer}.{name.rpartition('.')[2]}"] = tensor
    folder.mkdir()
    torch.save(theirs, folder / "pytorch_model.bin")
    said = {"mm_vision_tower": "x", "model_type": "llava_llama", "unfreeze_mm_vision_tower": tuned}
    (folder / "config.json").write_text(json.dumps(said))
    manifest = launch.prepare(stage2(folder, dialogues, tmp_path / "run", VICUNA))
    llava = start(manifest)
    got = llava.state_dict()
    assert all(torch.equal(got[name], (tensor + 1 if tuned else tensor).float()) for name, tensor in tower.items())
    if not tuned:
        with np.load(HF.parent / "golden.npz") as file:
            assert off(hf_logits(llava, "input_ids")[..., :512], file["logits"][..., :512]) <= 1e-4


def test_a_folder_of_xtuner_brings_what_it_trained(dialogues: Path, tmp_path: Path) -> None:
    folder = tmp_path / "xtuner"
    trained = load_file(LLAMA3 / "trained.safetensors")
    tower = {name: tensor + 1 for name, tensor in load_file(LLAMA3 / "vision" / "model.safetensors").items()}
    shutil.copytree(INTERNLM2 / "folder" / "projector", folder / "projector")
    model = llama3(tmp_path / "llm")
    shutil.copyfile(LLAMA3 / "llm" / "config.json", folder / "config.json")
    torch.save(
        {n.removeprefix("llm."): t for n, t in trained.items() if n[:4] == "llm."}, folder / "pytorch_model.bin"
    )
    (folder / "visual_encoder").mkdir()
    save_file(tower, folder / "visual_encoder" / "model.safetensors")
    manifest = launch.prepare(stage2(folder, dialogues, tmp_path / "run", model))
    assert manifest.origin and set(manifest.origin.files) == {
        *("projector/model.safetensors", "pytorch_model.bin", "visual_encoder/model.safetensors"),
    }
    got = start(manifest).state_dict()
    projector = load_file(folder / "projector" / "model.safetensors")
    assert torch.equal(got[f"{PROJECTOR}linear_2.bias"], projector["model.2.bias"])
    assert torch.equal(got["model.language_model.norm.weight"], trained["llm.model.norm.weight"].float())
    assert torch.equal(
        got["model.language_model.embed_tokens.weight"][:512], trained["llm.model.embed_tokens.weight"]
    )
    for name, tensor in tower.items():
        assert torch.equal(got[f"model.vision_tower.{name.removeprefix('vision_model.')}"], tensor.float())


def test_a_run_that_builds_on_one_begins_where_that_ended(dialogues: Path, tmp_path: Path) -> None:
    first = launch.prepare(
        stage2(INTERNLM2 / "iter_4.pth", dialogues, tmp_path / "first", INTERN, "tuning=projector")
    )
    before = start(first)
    trained = {name: p + 1 for name, p in before.named_parameters() if name.startswith(PROJECTOR)}
    finish(first, trained)
    second = launch.prepare(stage2(tmp_path / "first", dialogues, tmp_path / "second"))
    assert second.origin is None and second.recipe.model == INTERN
    after = start(second).state_dict()
    for name, tensor in before.state_dict().items():
        assert torch.equal(after[name], trained.get(name, tensor))
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"init_from=.*first is no run \(no manifest.json\); give a training run"):
        start(second)


def finish(manifest: RunManifest, trained: dict[str, Tensor]) -> None:
    """Write what a run leaves behind its last step."""
    run = Place(manifest.recipe.out)
    entries = [LedgerEntry(step + 1, 0, 1, 1, {0: ("a",)}) for step in range(manifest.num_steps)]
    with Lease(run) as lease:
        decide(run, world_size=1, driver=lease.id)
        saver = Saver(Store(run), attempt=1, rank=0, world_size=1, keep=1)
        saver.start(manifest.num_steps, {f"param/{name}": t.detach().clone() for name, t in trained.items()}, entries)
        saver.wait()
