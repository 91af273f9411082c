"""Conversion says what it did, proves it with none of our code, and refuses what it cannot do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.generate.llava import tiny_llava
from tests.tiny import make_parts, processor_spec

from rayllava.checkpoint.layouts import LAYOUTS, StoredModel
from rayllava.checkpoint.manifest import ModelManifest, read_model_manifest
from rayllava.convert import prove
from rayllava.convert.run import ConvertSpec, convert

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "tests" / "assets" / "hf_llava_448" / "model"
VICUNA = ConvertSpec(template="vicuna_v1", aspect="pad")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "export"
    tokenizer_dir = Path(make_parts(folder.parent / "parts").llm)
    manifest = ModelManifest(processor=processor_spec(max_length=512), family="vicuna", source="test", step=7)
    LAYOUTS["hf"].write(folder, StoredModel.of(tiny_llava(), tokenizer_dir), manifest)
    return folder


def test_an_export_is_proved_to_answer_alike_in_plain_transformers(export: Path, tmp_path: Path) -> None:
    proof = convert(export.parent, tmp_path / "hf", to="hf")
    assert proof["proved"] and proof["bit_equal"], proof
    assert json.loads((tmp_path / "hf" / "proof.json").read_text()) == proof
    assert proof.keys() >= {"max_abs_logit_diff", "bounds", "num_tensors", "bit_equal", "seconds"}
    assert all(row["ids_equal"] and row["max_abs_pixel_diff"] <= 1e-6 for row in proof["prompts"].values())
    assert read_model_manifest(tmp_path / "hf").step == 7


@pytest.mark.parametrize("name", ["hf_llava_437", "hf_llava_448"])
@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_a_published_folder_becomes_ours_with_a_template_named(name: str, aspect: str, tmp_path: Path) -> None:
    source = ROOT / "tests" / "assets" / name / "model"
    spec = ConvertSpec(template="vicuna_v1", aspect=aspect)
    proof = convert(source, tmp_path / "hf", to="hf", spec=spec)
    assert proof["bit_equal"] and proof["proved"], proof
    assert read_model_manifest(tmp_path / "hf").family == "vicuna"
    want, got = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "hf"))
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)


def test_converting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert(PUBLISHED, tmp_path / name, to="hf", spec=VICUNA)
    for path in (tmp_path / "one").iterdir():
        if path.name != "proof.json":
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_another_dtype_is_proved_within_its_rounding(export: Path, tmp_path: Path) -> None:
    proof = convert(export, tmp_path / "hf", to="hf", spec=ConvertSpec(dtype="bfloat16"))
    assert proof["proved"] and proof["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_damaged_tensor_is_no_proof(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = prove.plain_side

    def damaged(folder: Path) -> prove.Side:
        tensors = load_file(folder / "model.safetensors")
        tensors["multi_modal_projector.linear_1.bias"] += 0.1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return plain(folder)

    monkeypatch.setattr(prove, "plain_side", damaged)
    proof = convert(export, tmp_path / "hf", to="hf")
    assert not proof["proved"]
    assert proof["prompts"]["words"]["proved"] and not proof["prompts"]["wide"]["proved"]


def test_what_cannot_be_done_is_said_with_the_cure(export: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to=gguf cannot be written yet; there is: hf"):
        convert(export, tmp_path / "out", to="gguf")
    with pytest.raises(ValueError, match=r"add template=NAME, one of: .*vicuna_v1"):
        convert(PUBLISHED, tmp_path / "out", to="hf")
    with pytest.raises(ValueError, match="template=nonsense is none of"):
        convert(PUBLISHED, tmp_path / "out", to="hf", spec=ConvertSpec(template="nonsense"))
    with pytest.raises(ValueError, match="would overwrite SRC"):
        convert(export, export, to="hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and no earlier conversion"):
        convert(export, tmp_path / "full", to="hf")
    assert not (tmp_path / "out").exists()


def job(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={"PYTHONPATH": "platform", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_the_job_prints_a_proof_and_fails_in_one_line(export: Path, tmp_path: Path) -> None:
    done = job("jobs/convert.py", str(export), str(tmp_path / "hf"), "--to", "hf")
    assert done.returncode == 0, done.stderr
    assert "bit-equal" in done.stdout and "proved in" in done.stdout
    failed = job("jobs/convert.py", str(PUBLISHED), str(tmp_path / "other"), "--to", "hf")
    assert failed.returncode != 0 and failed.stderr.splitlines()[-1].startswith("error: SRC=")
    assert "Traceback" not in failed.stderr


def test_a_picture_is_talked_about_on_the_terminal(export: Path, tmp_path: Path) -> None:
    shutil.copyfile(ROOT / "tests" / "assets" / "hf_llava_448" / "image.png", tmp_path / "image.png")
    words = ["jobs/chat.py", str(export), "--image", str(tmp_path / "image.png"), "max_new_tokens=5"]
    done = job(*words, "--prompt", "What is shown?")
    assert done.returncode == 0 and done.stdout.endswith("\n"), done.stderr
