"""A start that does not fit is named, with tensor, shapes and cure, before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayllava.checkpoint.run import Origin
from rayllava.durable import digest
from rayllava.model.foreign import origin_of
from rayllava.train import launch
from tests.train.starts import HF, INTERN, INTERNLM2, LLAVA, VICUNA, stage2, start


def pth(folder: Path, **changes: Tensor | None) -> Path:
    """Write XTuner's checkpoint of a stage 1 with tensors changed, added, or (None) left out."""
    trained = {n: t for n, t in load_file(INTERNLM2 / "trained.safetensors").items() if n.startswith("projector.")}
    trained |= {name.replace("__", "."): tensor for name, tensor in changes.items()}  # type: ignore[dict-item]
    saved = {n: t for n, t in trained.items() if t is not None}
    config = "model = dict(\n    llm_lora=dict(\n        lora_alpha=16,\n        r=4))"
    torch.save({"meta": {"cfg": config}, "state_dict": saved}, folder / "iter_1.pth")
    return folder / "iter_1.pth"


MISFITS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "another tower": (
        {"projector__model__0__weight": torch.zeros(48, 64)},
        r"projector.model.0.weight is \(48, 64\); the model has \(48, 32\); give the model.llm and model.vi",
    ),
    "another llm": (
        {"projector__model__2__bias": torch.zeros(64)},
        r"projector.model.2.bias is \(64,\); the model has \(48,\); give the model.llm",
    ),
    "a deeper projector": (
        {"projector__model__4__weight": torch.zeros(48, 48)},
        r"projector.model.4.weight is \(48, 48\); the model has no such tensor; .* has two layers here",
    ),
    "a shallow projector": (
        {"projector__model__2__weight": None, "projector__model__2__bias": None},
        r"lacks model.multi_modal_projector.linear_2.weight \(48, 48\), but not the rest of it; give",
    ),
    "half an llm": (
        {"llm__model__norm__weight": torch.zeros(48)},
        r"lacks model.language_model.embed_tokens.weight \(576, 48\), but not the rest of it; give the",
    ),
    "another llm's blocks": (
        {"llm__model__layers__0__attention__wqkv__weight": torch.zeros(96, 40)},
        r"wqkv.weight is \(96, 40\), of which model.language_model.* is \(48, 40\); the model has \(48, 48\); give",
    ),
    "another llm's heads": (
        {"llm__model__layers__0__attention__wqkv__weight": torch.zeros(90, 48)},
        r"wqkv.weight \(90, 48\) cannot be taken apart as internlm2 says; give the model.llm",
    ),
    "another tower's positions": (
        {"visual_encoder__vision_model__embeddings__position_embedding__weight": torch.zeros(5, 32)},
        r"position_embedding.weight is \(5, 32\); the model has \(17, 32\); give the model.vision and model.ima",
    ),
    "half an adapter": (
        {"llm__base_model__model__output__lora_A__default__weight": torch.zeros(4, 48)},
        r"holds one half of the adapter on 'output'",
    ),
    "an adapter of rank 0": (
        {
            "llm__base_model__model__output__lora_A__default__weight": torch.zeros(0, 48),
            "llm__base_model__model__output__lora_B__default__weight": torch.zeros(512, 0),
        },
        r"holds one half of the adapter on 'output', or two that do not fit",
    ),
    "adapters of unknown scale": (
        {
            "visual_encoder__base_model__model__vision_model__x__lora_A__default__weight": torch.zeros(4, 48),
            "visual_encoder__base_model__model__vision_model__x__lora_B__default__weight": torch.zeros(48, 4),
        },
        r"its training config does not say visual_encoder_lora.lora_alpha; give the folder that `xtuner convert",
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
    with pytest.raises(
        ValueError, match=r"lm_head.weight is \(700, 64\); the model has \(576, 64\); give the model.llm"
    ):
        launch.prepare(stage2(folder, dialogues, tmp_path / "run", VICUNA))


def test_a_start_that_is_none_is_named(dialogues: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "mp_rank_00_model_states.pt").touch()
    damaged = tmp_path / "damaged.bin"
    damaged.write_bytes((LLAVA / "pretrain" / "mm_projector.bin").read_bytes()[:-100])
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("[1")
    for source, model, said in [
        (tmp_path / "odd", VICUNA, r"odd/config.json is damaged .*; fetch it again"),
        (tmp_path / "none", VICUNA, r"init_from=.*none does not exist here; give a run or a checkpoint"),
        (
            tmp_path / "empty",
            VICUNA,
            r"init_from=.*empty is no run, nor a model in a layout .*: gguf, hf, llava, xtuner",
        ),
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
