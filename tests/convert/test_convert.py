"""Conversion says what it did, proves it with none of our code, and refuses what it cannot do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayllava.checkpoint.layouts import LAYOUTS, StoredModel
from rayllava.checkpoint.manifest import ModelManifest, read_model_manifest
from rayllava.convert import prove
from rayllava.convert.run import ConvertSpec, convert
from tests.generate.llava import tiny_llava
from tests.tiny import make_parts, processor_spec

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


@pytest.mark.parametrize("kind", ["phi3", "internvl"])
def test_other_language_models_and_towers_are_proved_too(kind: str, export: Path, tmp_path: Path) -> None:
    LAYOUTS["hf"].write(
        tmp_path / "export", StoredModel.of(tiny_llava(kind=kind), export), read_model_manifest(export)
    )
    proof = convert(tmp_path, tmp_path / "hf", to="hf")
    assert proof["proved"] and proof["bit_equal"], proof


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


def test_a_template_without_jinja_is_proved_on_our_ids(tmp_path: Path) -> None:
    proof = convert(PUBLISHED, tmp_path / "hf", to="hf", spec=ConvertSpec(template="mpt", family="vicuna"))
    assert proof["proved"], proof
    assert not (tmp_path / "hf" / "chat_template.json").exists()


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


def job(*words: str, input: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={"PYTHONPATH": "platform", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        input=input,
        capture_output=True,
        text=True,
    )


def test_the_job_prints_a_proof(export: Path, tmp_path: Path) -> None:
    done = job("jobs/convert.py", str(export), str(tmp_path / "hf"), "--to", "hf")
    assert done.returncode == 0, done.stderr
    assert "bit-equal" in done.stdout and "proved in" in done.stdout


class Endpoint(BaseHTTPRequestHandler):
    """As much of an OpenAI-compatible endpoint as a chat needs."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        self._say("application/json", json.dumps({"object": "list", "data": [{"id": "llava", "object": "model"}]}))

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        pieces = [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in ("a ", "cat")]
        self._say("text/event-stream", "".join(f"data: {json.dumps(p)}\n\n" for p in pieces) + "data: [DONE]\n\n")

    def _say(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: Any) -> None:
        pass


def test_an_endpoint_is_talked_to_with_the_picture_in_the_first_turn() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    image = str(PUBLISHED.parent / "image.png")
    done = job("jobs/chat.py", f"http://127.0.0.1:{server.server_port}", "--image", image, input="What?\n\nSure?\n")
    server.shutdown()
    assert done.returncode == 0 and done.stdout == "a cat\na cat\n", done.stderr
    first, answer, second = Endpoint.asked[1]["messages"]
    assert [part["type"] for part in first["content"]] == ["image_url", "text"]
    assert answer == {"role": "assistant", "content": "a cat"}
    assert second["content"] == [{"type": "text", "text": "Sure?"}]


def test_a_picture_is_talked_about_on_the_terminal(export: Path, tmp_path: Path) -> None:
    shutil.copyfile(ROOT / "tests" / "assets" / "hf_llava_448" / "image.png", tmp_path / "image.png")
    words = ["jobs/chat.py", str(export), "--image", str(tmp_path / "image.png"), "max_new_tokens=5"]
    done = job(*words, "--prompt", "What is shown?")
    assert done.returncode == 0 and done.stdout.endswith("\n"), done.stderr
