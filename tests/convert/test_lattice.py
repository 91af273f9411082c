"""Every layout from every other, for every family: proved by what both sides answer, and bit for bit back again."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rayllava.checkpoint.layouts import TABLES, detect
from rayllava.checkpoint.manifest import SourceSpec
from rayllava.convert.run import ConvertSpec, convert
from rayllava.generate.load import load_engine
from rayllava.model.source import open_source
from rayllava.records import Request, Turn
from tests.convert.trained import ALPHA, ASSETS, FAMILIES, RANK, Tuned, asked, make

TARGETS = ("xtuner", "llava", "hf", "gguf")


@pytest.fixture(scope="module", params=[(f, t) for f in FAMILIES for t in get_args(Tuned)], ids="-".join)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Tuned]:
    family, tuned = request.param
    return make(tmp_path_factory.mktemp(f"{family}-{tuned}"), family, tuned), family, tuned


def proved(src: Path, dst: Path, to: str, spec: ConvertSpec | None = None) -> dict[str, Any]:
    proof = convert(src, dst, to=to, spec=spec)
    assert proof["proved"], json.dumps(proof, indent=1)
    assert proof["num_tensors"] > 60 and len(proof["prompts"]) == 5
    return proof


def tensors_of(path: Path, scratch: Path, spec: SourceSpec | None = None) -> dict[str, Tensor]:
    """Return the tensors of a model by canonical name, without the rows of added tokens."""
    scratch.mkdir(parents=True)
    return dict(open_source(path, spec or SourceSpec(), scratch=scratch).stored.own_rows().tensors())


def has_what_was_trained(path: Path, folder: Path, tuned: Tuned) -> None:
    """Assert that a model's tower is the trained one: an untrained one would answer, and nobody would notice."""
    trained = torch.load(folder / "iter_9.pth", weights_only=True)["state_dict"]
    base = load_file(folder / "vision" / "model.safetensors")
    name = "encoder.layers.0.self_attn.q_proj"
    before = want = base[f"vision_model.{name}.weight"]
    if tuned == "full":
        want = trained[f"visual_encoder.vision_model.{name}.weight"]
    else:
        at = f"visual_encoder.base_model.model.vision_model.{name}.lora_{{}}.default.weight"
        want = before + ALPHA / RANK * trained[at.format("B")] @ trained[at.format("A")]
    with TemporaryDirectory() as scratch:
        stored = open_source(path, SourceSpec(), scratch=Path(scratch)).stored
        got = stored.weights[f"model.vision_tower.{name}.weight"].read().float()
    assert (got - want).abs().max() < 1e-3 < (got - before).abs().max() / 10


def test_every_layout_becomes_every_other(model: tuple[Path, str, Tuned], tmp_path: Path) -> None:
    folder, family, tuned = model
    spec = asked(folder, family, tuned)
    for to in TARGETS:
        proved(folder / "trained", tmp_path / to, to, spec)
        assert detect(tmp_path / to) == to
        has_what_was_trained(tmp_path / to, folder, tuned)
    for src in TARGETS:
        for to in TARGETS:
            if src != to:
                proved(tmp_path / src, tmp_path / f"{src}-{to}", to)
                has_what_was_trained(tmp_path / f"{src}-{to}", folder, tuned)


def test_a_training_checkpoint_becomes_every_layout(model: tuple[Path, str, Tuned], tmp_path: Path) -> None:
    folder, family, tuned = model
    for to in TARGETS:
        proved(folder / "iter_9.pth", tmp_path / to, to, asked(folder, family, tuned, pth=True))
        has_what_was_trained(tmp_path / to, folder, tuned)


def test_around_the_lattice_no_bit_changes(model: tuple[Path, str, Tuned], tmp_path: Path) -> None:
    folder, family, tuned = model
    proved(folder / "trained", tmp_path / "0-xtuner", "xtuner", asked(folder, family, tuned))
    path = tmp_path / "0-xtuner"
    for number, to in enumerate(("hf", "llava", "hf", "xtuner"), 1):
        proved(path, tmp_path / f"{number}-{to}", to)
        path = tmp_path / f"{number}-{to}"
    want, got = tensors_of(tmp_path / "0-xtuner", tmp_path / "a"), tensors_of(path, tmp_path / "b")
    if family == "phi3":  # LLaVA's layout knows Llama alone: what was one tensor comes back as its parts
        want = taken_apart(want)
    assert want.keys() == got.keys()
    assert [
        name for name in want if not torch.equal(want[name], got[name]) or want[name].dtype != got[name].dtype
    ] == []
    if tuned == "full" and family in ("vicuna", "llama3"):  # names in the file, too
        trained = tensors_of(folder / "trained", tmp_path / "c", asked(folder, family, tuned))
        assert all(torch.equal(trained[name], got[name]) for name in trained)


def taken_apart(phi3: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split the fused tensors of a Phi-3 with as many key heads as query heads."""
    found = {}
    for name, tensor in phi3.items():
        for fused, parts in (
            ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
            ("gate_up_proj", ("gate_proj", "up_proj")),
        ):
            if f".{fused}." in name:
                pieces = tensor.chunk(len(parts))
                found |= {name.replace(fused, part): piece for part, piece in zip(parts, pieces, strict=True)}
                break
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gguf_loses_what_its_type_loses_and_nothing_else(
    dtype: str, model: tuple[Path, str, Tuned], tmp_path: Path
) -> None:
    folder, family, tuned = model
    proved(folder / "trained", tmp_path / "hf", "hf", asked(folder, family, tuned, dtype=dtype))
    proved(tmp_path / "hf", tmp_path / "gguf", "gguf")
    proved(tmp_path / "gguf", tmp_path / "back", "hf")
    want, got = tensors_of(tmp_path / "hf", tmp_path / "a"), tensors_of(tmp_path / "back", tmp_path / "b")
    want = taken_apart(want) if family == "phi3" else want
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        if "vision_tower" in name and (".layers.2." in name or "post_layernorm" in name):
            continue  # the block and the norm behind the state that the projector takes
        halved = "vision_tower" in name or "multi_modal_projector" in name
        same = tensor.half() if halved and dtype != "float32" else tensor
        if dtype == "float32" and ("patch_embedding" in name or "projector.linear" in name) and tensor.ndim > 1:
            same = tensor.half()
        if same.ndim == 1:
            same = tensor
        assert torch.equal(got[name].float(), same.float()), name


def test_added_rows_come_and_go(tmp_path: Path) -> None:
    folder = make(tmp_path / "made", "llama3", "full")
    proved(folder / "trained", tmp_path / "hf", "hf", asked(folder, "llama3", "full"))
    proved(tmp_path / "hf", tmp_path / "llava", "llava")
    words = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "llava")}
    assert words["hf"]["text_config"]["vocab_size"] == 576 and words["llava"]["vocab_size"] == 512
    stored = open_source(tmp_path / "llava", SourceSpec(), scratch=tmp_path_of(tmp_path, "s")).stored
    assert stored.weights[TABLES[0]].shape[0] == 576 and stored.num_own_rows == 512


def tmp_path_of(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_plain_transformers_answers_as_our_engine_does(model: tuple[Path, str, Tuned], tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder, family, tuned = model
    proved(folder / "trained", tmp_path / "hf", "hf", asked(folder, family, tuned, dtype="float32"))
    picture = ASSETS / "gguf_llava" / "image_square.png"
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    plain: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    dialogue = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]
    words = processor.apply_chat_template(dialogue, add_generation_prompt=True)
    given = processor(text=words, images=[Image.open(picture)], return_tensors="pt")
    assert int((given["input_ids"] == plain.config.image_token_id).sum()) == 16
    made = plain.generate(**given, max_new_tokens=24, do_sample=False)
    want = processor.tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    engine = load_engine(tmp_path / "hf")
    turns = (Turn("user", "<image>\nWhat is shown?"),)
    request = Request("ask", turns, (picture.read_bytes(),), max_new_tokens=24)
    assert "".join(delta.text for delta in engine.generate([request])).strip() == want.strip() != ""
