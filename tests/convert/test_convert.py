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

from rayllava.checkpoint.layouts import StoredModel, write
from rayllava.checkpoint.manifest import ModelManifest, read_model_manifest
from rayllava.convert import prove
from rayllava.convert.run import ConvertSpec, convert, explain
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
    write("hf", folder, StoredModel.of(tiny_llava(), tokenizer_dir, num_own_rows=330), manifest)
    return folder


def test_an_export_is_proved_to_answer_alike_in_plain_transformers(export: Path, tmp_path: Path) -> None:
    proof = convert(export.parent, tmp_path / "hf", to="hf")
    assert proof["proved"] and proof["bit_equal"], proof
    assert json.loads((tmp_path / "hf" / "proof.json").read_text()) | {"at": str(tmp_path / "hf")} == proof
    assert read_model_manifest(tmp_path / "hf").proved is True
    assert proof.keys() >= {"max_abs_logit_diff", "bounds", "num_tensors", "bit_equal", "seconds"}
    assert all(row["ids_equal"] and row["max_abs_pixel_diff"] <= 1e-6 for row in proof["prompts"].values())
    assert read_model_manifest(tmp_path / "hf").step == 7


@pytest.mark.parametrize("kind", ["phi3", "internvl"])
def test_other_language_models_and_towers_are_proved_too(kind: str, export: Path, tmp_path: Path) -> None:
    stored = StoredModel.of(tiny_llava(kind=kind), export, num_own_rows=330)
    write("hf", tmp_path / "export", stored, read_model_manifest(export))
    proof = convert(tmp_path, tmp_path / "hf", to="hf")
    assert proof["proved"] and proof["bit_equal"], proof


@pytest.mark.parametrize(
    ("kind", "to", "said"),
    [
        ("internvl", "llava", "to=llava holds CLIP towers alone, and this one is internvl_vision: .*; use to=hf"),
        ("internvl", "xtuner", "to=xtuner holds CLIP towers alone, and this one is internvl_vision: .*; use to=hf"),
        ("internvl", "gguf", "to=gguf holds CLIP towers alone, and this one is internvl_vision: .*; use to=hf"),
        (
            "qwen2",
            "llava",
            "to=llava holds language models of the Llama kind alone, and this one is qwen2; use to=hf",
        ),
        ("qwen2", "gguf", "to=gguf holds language models of the Llama kind alone, and this one is qwen2; use to=hf"),
    ],
)
def test_what_a_layout_cannot_hold_is_said_before_anything_is_written(
    kind: str, to: str, said: str, export: Path, tmp_path: Path
) -> None:
    stored = StoredModel.of(tiny_llava(kind=kind), export, num_own_rows=330)
    write("hf", tmp_path / "export", stored, read_model_manifest(export))
    with pytest.raises(ValueError, match=said):
        convert(tmp_path, tmp_path / "out", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


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
        convert(PUBLISHED, tmp_path / name / "model", to="hf", spec=VICUNA)
    for path in (tmp_path / "one" / "model").iterdir():
        if path.name != "proof.json":
            assert path.read_bytes() == (tmp_path / "two" / "model" / path.name).read_bytes(), path.name


def test_another_dtype_is_proved_within_its_rounding(export: Path, tmp_path: Path) -> None:
    proof = convert(export, tmp_path / "hf", to="hf", spec=ConvertSpec(dtype="bfloat16"))
    assert proof["proved"] and proof["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_damaged_tensor_is_no_proof(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = prove.plain_side

    def damaged(folder: Path, *rest: Any) -> list[prove.Seen]:
        tensors = load_file(folder / "model.safetensors")
        tensors["multi_modal_projector.linear_1.bias"] += 0.1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return plain(folder, *rest)

    monkeypatch.setattr(prove, "plain_side", damaged)
    convert(export, tmp_path / "hf", to="hf", spec=ConvertSpec(proof=False))
    before = (tmp_path / "hf" / "proof.json").read_text()
    proof = convert(export, tmp_path / "hf", to="hf", spec=ConvertSpec(force=True))
    assert not proof["proved"]
    assert proof["prompts"]["words"]["proved"] and not proof["prompts"]["wide"]["proved"]
    # What failed lies beside, and what was there is there.
    assert proof["at"] == str(tmp_path / "hf.unproved") and (tmp_path / "hf" / "proof.json").read_text() == before
    assert read_model_manifest(tmp_path / "hf.unproved").proved is False


def test_what_cannot_be_done_is_said_with_the_cure(export: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to=ggml is no layout; there are: gguf, hf, llava, xtuner"):
        convert(export, tmp_path / "out", to="ggml")
    with pytest.raises(ValueError, match="dtype=q4_0 is not written in this layout; there are: float32, bfloat16"):
        convert(export, tmp_path / "out", to="hf", spec=ConvertSpec(dtype="q4_0"))
    with pytest.raises(ValueError, match=r"add template=NAME, one of: .*vicuna_v1"):
        convert(PUBLISHED, tmp_path / "out", to="hf")
    with pytest.raises(ValueError, match="template=nonsense is none of"):
        convert(PUBLISHED, tmp_path / "out", to="hf", spec=ConvertSpec(template="nonsense"))
    with pytest.raises(ValueError, match="would overwrite"):
        convert(export, export, to="hf", spec=ConvertSpec(force=True))
    with pytest.raises(ValueError, match="SRC=nowhere does not exist; give a checkpoint that is here"):
        convert("nowhere", tmp_path / "out", to="hf")
    with pytest.raises(ValueError, match="DST=s3:/bucket/out is an address; give a folder on a disk"):
        convert(export, Path("s3://bucket/out"), to="hf")
    with pytest.raises(ValueError, match="is a whole model; leave --base out"):
        convert(export, tmp_path / "out", to="llava", spec=ConvertSpec(base=str(export)))
    with pytest.raises(ValueError, match="part=llm is written with its adapters merged; leave --keep-adapters out"):
        convert(export, tmp_path / "out", to="hf", spec=ConvertSpec(part="llm", keep_adapters=True))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty; give another folder, or add --force"):
        convert(export, tmp_path / "full", to="hf")
    assert not (tmp_path / "out").exists()


def test_no_proof_is_said_and_nothing_is_called_proved(export: Path, tmp_path: Path) -> None:
    done = job("jobs/convert.py", str(export), str(tmp_path / "hf"), "--to", "hf", "--no-proof")
    assert done.returncode == 0 and "not proved" in done.stdout, done.stderr
    proof = json.loads((tmp_path / "hf" / "proof.json").read_text())
    assert proof["proved"] is False and proof["reason"] == "not asked for: --no-proof"


def test_explain_says_what_every_tensor_is_made_of(export: Path, tmp_path: Path) -> None:
    rows = {row[0]: row[1:] for row in explain(export, to="gguf", spec=ConvertSpec(dtype="q8_0"))}
    assert rows["blk.0.attn_q.weight"] == (
        "float32 (64, 64)",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "rows of heads reordered, to Q8_0",
    )
    assert rows["output_norm.weight"][2] == "to F32"
    rows = {row[0]: row[1:] for row in explain(export, to="llava")}
    assert rows["lm_head.weight"] == ("float32 (330, 64)", "language_model.lm_head.weight", "first 330 rows")
    assert rows["model.mm_projector.2.bias"][1:] == ("multi_modal_projector.linear_2.bias", "as it is")
    done = job("jobs/convert.py", str(export), str(tmp_path / "x"), "--to", "llava", "--explain")
    assert "model.mm_projector.2.bias\tfloat32 (64,)\tmulti_modal" in done.stdout and not (tmp_path / "x").exists()


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
