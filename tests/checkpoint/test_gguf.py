"""GGUF pairs are those of llama.cpp's own scripts, bit for bit, and llama.cpp makes of them what torch makes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayllava.checkpoint.gguffile import GgufTensor, Kv, decoded, encoded, read_gguf, write_gguf
from rayllava.checkpoint.layouts import LAYOUTS, detect
from rayllava.checkpoint.layouts._gguf_names import permuted
from rayllava.checkpoint.manifest import SourceSpec
from rayllava.checkpoint.weights import Computed
from rayllava.convert.run import ConvertSpec, convert
from rayllava.generate.load import load_engine
from rayllava.model.restore import restore
from rayllava.model.source import open_source
from rayllava.prompt.tokens import Tokenizer

ASSETS = Path(__file__).parents[1] / "assets"
GOLDEN = ASSETS / "gguf_llava"
MODEL = ASSETS / "hf_llava_437" / "model"
SPEC = ConvertSpec(template="vicuna_v1", aspect="pad")

OURS = {
    "rayllava.num_own_rows",
    "rayllava.space_prefix",
    "tokenizer.chat_template",
    "tokenizer.ggml.add_space_prefix",
}
"""What we say beside what llama.cpp's scripts say of this model, which came without a chat template."""


@pytest.fixture(scope="module", params=["f16", "f32"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "pair"
    proof = convert(MODEL, folder, to="gguf", spec=SPEC.but(dtype=request.param))
    assert proof["proved"], proof
    return request.param, folder


def listing(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    said, tensors = read_gguf(path)
    return dict(said), {name: (t.kind, list(t.shape)) for name, t in tensors.items()}


def golden_listing(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    dump = json.loads((GOLDEN / f"{name}.dump.json").read_text())
    said = {k: v["value"] for k, v in dump["metadata"].items() if not k.startswith("GGUF.")}
    return said, {n: (t["type"], t["shape_numpy"]) for n, t in dump["tensors"].items()}


@pytest.mark.parametrize(("ours", "theirs"), [("model-{}", "llava-tiny-{}"), ("model-mmproj-{}", "mmproj-{}")])
def test_names_shapes_types_and_metadata_are_llama_cpps_own(
    ours: str, theirs: str, written: tuple[str, Path]
) -> None:
    kind, folder = written
    said, tensors = listing(folder / f"{ours.format(kind)}.gguf")
    want, want_tensors = golden_listing(theirs.format(kind))
    assert tensors == want_tensors
    named = {"general.name"}  # after the folder that was converted
    assert said.keys() - want.keys() == (OURS if "mmproj" not in ours else set())
    assert want.keys() <= said.keys()
    for key in want.keys() - named:
        have, golden = said[key], want[key]
        if isinstance(golden, dict):  # long arrays are told by their ends
            assert len(have) == golden["len"]
            have, golden = [*have[:8], *have[-8:]], [*golden["first"], *golden["last"]]
        assert have == golden, key


@pytest.mark.parametrize(("ours", "theirs"), [("model-f16", "llava-tiny-f16"), ("model-mmproj-f16", "mmproj-f16")])
def test_tensors_are_llama_cpps_own_bit_for_bit(ours: str, theirs: str, written: tuple[str, Path]) -> None:
    kind, folder = written
    if kind != "f16":
        return
    _, got = read_gguf(folder / f"{ours}.gguf")
    _, want = read_gguf(GOLDEN / f"{theirs}.gguf")
    assert all(torch.equal(got[name].read(), tensor.read()) for name, tensor in want.items())


def golden_pair(tmp_path: Path, mmproj: str) -> Path:
    folder = tmp_path / "pair"
    folder.mkdir()
    for name in ("llava-tiny-f16", mmproj):
        (folder / f"{name}.gguf").write_bytes((GOLDEN / f"{name}.gguf").read_bytes())
    return folder


@pytest.mark.parametrize("mmproj", ["mmproj-f16", "mmproj-legacy-f16"])
def test_a_foreign_pair_becomes_the_model_that_it_was_made_of(mmproj: str, tmp_path: Path) -> None:
    folder = golden_pair(tmp_path, mmproj)
    assert detect(folder) == detect(folder / f"{mmproj}.gguf") == "gguf"
    proof = convert(folder, tmp_path / "hf", to="hf", spec=SPEC)
    assert proof["proved"], proof
    got, want = (dict(LAYOUTS["hf"].read(path).own_rows().tensors()) for path in (tmp_path / "hf", MODEL))
    assert got.keys() == want.keys()
    unused = ("layers.2.", "post_layernorm")
    for name, tensor in want.items():
        if "vision_tower" not in name or not any(part in name for part in unused):
            assert torch.equal(got[name].float(), tensor.float()), name


def test_the_projector_gives_what_torch_gave(tmp_path: Path) -> None:
    source = open_source(golden_pair(tmp_path, "mmproj-f16"), SPEC, scratch=scratch(tmp_path))
    llava = restore(source.stored, dtype=torch.float32)
    with np.load(GOLDEN / "image_embd.npz") as file, torch.inference_mode():
        pixels, want = torch.from_numpy(file["pixel_values"]), torch.from_numpy(file["torch_expected"])
        seen = llava.model.get_image_features(pixel_values=pixels)
        theirs = {
            name: np.abs(file[f"llamacpp_{name}"] - file["torch_cls_last"]).max() for name in ("fl_f16", "fl_f32")
        }
        apart = float(np.abs(file["torch_cls_last"] - file["torch_expected"]).max())
    got = getattr(seen, "pooler_output", seen)
    got = torch.cat(list(got)) if isinstance(got, list | tuple) else got.reshape(-1, got.shape[-1])
    assert (got - want).abs().max() < 1e-4
    # llama.cpp's own differs by where it puts the class token, and by no more than its float16 apart from that.
    assert max(theirs.values()) < 0.05 < 1 < apart


def as_llama_cpp_says(pieces: Iterable[str]) -> str:
    """Return the text of tokens; control tokens, and bytes that are no character, are left out."""
    pieces = [piece for piece in pieces if piece not in ("<unk>", "<s>", "</s>")]
    said = b"".join(bytes.fromhex(p[3:5]) if p.startswith("<0x") else p.replace("▁", " ").encode() for p in pieces)
    return said.decode(errors="ignore")


def test_words_are_read_and_answered_as_in_llama_cpp(tmp_path: Path) -> None:
    source = open_source(golden_pair(tmp_path, "mmproj-f16"), SPEC, scratch=scratch(tmp_path))
    with np.load(GOLDEN / "llamacpp_text.npz") as file:
        ids, logits = file["text_input_ids"], file["text_logits_f16"]
    words = "USER: How many people are there? ASSISTANT:"
    tokenizer = Tokenizer(source.stored.tokenizer_dir)
    assert [1, *tokenizer.encode(words).ids.tolist()] == ids.tolist()
    llava = restore(source.stored, dtype=torch.float32)
    with torch.inference_mode():
        got = llava(input_ids=torch.from_numpy(ids).unsqueeze(0)).logits[0].numpy()
        more = llava.generate(
            input_ids=torch.from_numpy(ids).unsqueeze(0), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
    assert np.abs(got[:, :512] - logits[:, :512]).max() < 2e-2
    want = json.loads((GOLDEN / "llamacpp.json").read_text())["text_greedy_f16"]
    pieces = read_gguf(GOLDEN / "llava-tiny-f16.gguf")[0]["tokenizer.ggml.tokens"]
    assert as_llama_cpp_says(pieces[id_] for id_ in more[0, len(ids) :].tolist()) == want


def test_an_engine_reads_a_pair(tmp_path: Path) -> None:
    engine = load_engine(golden_pair(tmp_path, "mmproj-f16"), source=SourceSpec(template="vicuna_v1"))
    assert engine is not None


def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
def test_blocks_hold_numbers_within_their_step(kind: str) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(6, 64)
    back = decoded(encoded(tensor, kind), kind, (6, 64))
    steps = {"Q8_0": 127.0, "Q5_0": 16.0, "Q4_0": 8.0}
    scale = tensor.reshape(-1, 32).abs().amax(1, keepdim=True) / steps[kind]
    assert ((back - tensor).reshape(-1, 32).abs() <= scale * 1.01 + 1e-6).all()


@pytest.mark.parametrize("dtype", ["q8_0", "q5_0", "q4_0", "bf16"])
def test_quantized_pairs_are_proved_and_read_back(dtype: str, tmp_path: Path) -> None:
    proof = convert(MODEL, tmp_path / "pair", to="gguf", spec=SPEC.but(dtype=dtype))
    assert proof["proved"] and proof["bit_equal"], proof
    _, tensors = read_gguf(tmp_path / "pair" / f"model-{dtype}.gguf")
    kinds = {name: tensor.kind for name, tensor in tensors.items()}
    head = {"q5_0": "Q8_0", "q4_0": "Q8_0"}.get(dtype, dtype.upper())
    assert kinds["output.weight"] == head and kinds["blk.0.attn_q.weight"] == dtype.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert convert(tmp_path / "pair", tmp_path / "hf", to="hf")["proved"]


def test_the_order_of_heads_is_undone_with_fewer_key_heads() -> None:
    tensor = torch.randn(8 * 6, 10)
    held = Computed((48, 10), torch.float32, lambda: tensor)
    for name, heads in (("model.layers.0.self_attn.q_proj.weight", 8), ("blk.0.attn_k.weight", 4)):
        there = permuted(name, held, heads=8, groups=4)
        assert not torch.equal(there.read(), tensor)
        assert torch.equal(permuted(name, there, heads=8, groups=4, back=True).read(), tensor)
        want = tensor.reshape(heads, 2, 48 // heads // 2, 10).swapaxes(1, 2).reshape(48, 10)
        assert torch.equal(there.read(), want)


def test_a_modelfile_says_the_template_in_ollamas_words(written: tuple[str, Path]) -> None:
    kind, folder = written
    lines = (folder / f"OLLAMA_MODELFILE_{kind.upper()}").read_text()
    assert lines.startswith(f"FROM ./model-{kind}.gguf\nFROM ./model-mmproj-{kind}.gguf\nTEMPLATE ")
    assert "{{ if .System }}{{ .System }} {{ end }}{{ if .Prompt }}USER: {{ .Prompt }} {{ end }}" in lines
    assert "ASSISTANT:{{ .Response }}</s>" in lines
    assert 'SYSTEM """A chat between a curious user' in lines
    assert 'PARAMETER stop "</s>"' in lines and 'PARAMETER stop "USER:"' in lines and "<image>" not in lines


def test_every_kind_of_value_comes_back(tmp_path: Path) -> None:
    said = {
        "general.architecture": Kv("s", "llama"),
        "a.flag": Kv("?", True),
        "a.number": Kv("I", 7),
        "a.share": Kv("f", 0.5),
        "a.list": Kv("[i", [1, -2]),
        "a.words": Kv("[s", ["ü", ""]),
        "a.shares": Kv("[f", [0.5, 1.0]),
    }
    tensor = torch.arange(64.0).reshape(2, 32)
    held = Computed((2, 32), torch.float32, lambda: tensor)
    write_gguf(tmp_path / "file.gguf", said, {"t": (held, "F32"), "h": (held, "F16"), "q": (held, "Q8_0")})
    got, tensors = read_gguf(tmp_path / "file.gguf")
    assert got == {key: kv.value for key, kv in said.items()}
    assert isinstance(tensors["t"], GgufTensor) and torch.equal(tensors["t"].read(), tensor)
    assert tensors["h"].read().dtype == torch.float16 and tensors["q"].kind == "Q8_0"


def test_one_of_several_language_models_has_to_be_named(tmp_path: Path) -> None:
    folder = golden_pair(tmp_path, "mmproj-f16")
    (folder / "other.gguf").write_bytes((folder / "llava-tiny-f16.gguf").read_bytes())
    with pytest.raises(ValueError, match=r"one language model file is wanted .* llava-tiny-f16.gguf, other.gguf"):
        convert(folder, tmp_path / "hf", to="hf", spec=SPEC)
    assert convert(folder / "other.gguf", tmp_path / "hf", to="hf", spec=SPEC)["proved"]
    (folder / "mmproj-f16.gguf").unlink()
    with pytest.raises(ValueError, match=r"one mmproj file is wanted .* there is none"):
        convert(folder / "other.gguf", tmp_path / "x", to="hf", spec=SPEC)
