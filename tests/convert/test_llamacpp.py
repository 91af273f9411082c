"""GGUF pairs run in llama.cpp and answer as torch does; skipped where llama-cpp-python is not installed."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayllava.checkpoint.gguffile import read_gguf
from rayllava.checkpoint.manifest import SourceSpec
from rayllava.convert import prove
from rayllava.convert.run import ConvertSpec, convert
from rayllava.model.restore import restore
from rayllava.model.source import Source, open_source
from rayllava.prompt.encode import Processor
from rayllava.records import Sample, Turn
from tests.convert.trained import FAMILIES, asked, make

llama_cpp = pytest.importorskip("llama_cpp")

ASSETS = Path(__file__).parents[1] / "assets"
MODEL = ASSETS / "hf_llava_437" / "model"
SQUARE = ASSETS / "gguf_llava" / "image_square.png"
NUM = 24


def files(folder: Path) -> tuple[Path, Path]:
    found = sorted(folder.glob("*.gguf"), key=lambda path: "mmproj" in path.name)
    return found[0], found[1]


def ours(source: Source, llava: Any, text: str, images: tuple[bytes, ...]) -> list[int]:
    """Return the ids that torch says next, greedily, whatever they are."""
    spec = source.manifest.processor
    processor = Processor(spec, source.stored.tokenizer_dir)
    example = processor.encode(Sample("one", (Turn("user", text),), images), open_turn=True)
    ids = torch.from_numpy(example.ids).long().unsqueeze(0)
    pixels = prove.normalise(torch.from_numpy(example.pixels), spec, dtype=torch.float32) if images else None
    said: list[int] = []
    with torch.inference_mode():
        for _ in range(NUM):
            logits = llava(
                input_ids=torch.cat([ids, torch.tensor([said]).long().reshape(1, -1)], 1), pixel_values=pixels
            )
            said.append(int(logits.logits[0, -1, : source.stored.num_own_rows].argmax()))
    return said


def spoken(source: Source, path: Path, ids: Iterable[int]) -> str:
    said, _ = read_gguf(path)
    pieces = [said["tokenizer.ggml.tokens"][i] for i in ids if said["tokenizer.ggml.token_type"][i] != 3]
    raw = b"".join(bytes.fromhex(p[3:5]) if p.startswith("<0x") else p.replace("▁", " ").encode() for p in pieces)
    return raw.decode(errors="ignore")


@pytest.fixture(scope="module", params=["f32", "f16"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "pair"
    spec = ConvertSpec(template="vicuna_v1", aspect="pad", dtype=request.param)
    proof = convert(MODEL, folder, to="gguf", spec=spec)
    assert proof["proved"] and proof["llama_cpp"]["proved"], proof
    return folder


def opened(folder: Path, tmp_path: Path) -> Source:
    (tmp_path / "scratch").mkdir()
    return open_source(folder, SourceSpec(), scratch=tmp_path / "scratch")


def test_words_are_continued_as_in_torch(pair: Path, tmp_path: Path) -> None:
    source, (llm, _) = opened(pair, tmp_path), files(pair)
    llava = restore(source.stored, dtype=torch.float32)
    want = ours(source, llava, "How many days has a week?", ())
    spec = source.manifest.processor
    example = Processor(spec, source.stored.tokenizer_dir).encode(
        Sample("one", (Turn("user", "How many days has a week?"),)), open_turn=True
    )
    model = llama_cpp.Llama(str(llm), n_ctx=512, logits_all=True, verbose=False)
    got: list[int] = []
    model.eval(example.ids.tolist())
    for _ in range(NUM):
        got.append(int(np.argmax(model.scores[model.n_tokens - 1][: source.stored.num_own_rows])))
        model.eval([got[-1]])
    assert got == want


class LastClass(torch.nn.Module):
    """CLIP's embeddings as llama.cpp has them since its multimodal library: the class token behind the patches.

    Positions and the choice of patches still take it for the first: the deviation of ggml-org/llama.cpp#25814.
    """

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.inner = embeddings

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> torch.Tensor:
        inner = self.inner
        patches = (
            inner.patch_embedding(pixel_values.to(inner.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        )
        first = inner.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([patches, first], 1) + inner.position_embedding(inner.position_ids)


def test_a_picture_is_answered_as_in_torch_but_for_the_place_of_the_class_token(pair: Path, tmp_path: Path) -> None:
    from llama_cpp.llama_chat_format import Llava15ChatHandler

    source, (llm, mmproj) = opened(pair, tmp_path), files(pair)
    llava = restore(source.stored, dtype=torch.float32)
    ask = "What is shown in this image?"
    right = ours(source, llava, f"<image>\n{ask}", (SQUARE.read_bytes(),))
    tower = llava.model.vision_tower
    (tower.vision_model if hasattr(tower, "vision_model") else tower).embeddings = LastClass(tower.embeddings)
    theirs = ours(source, llava, f"<image>\n{ask}", (SQUARE.read_bytes(),))

    class Ours(Llava15ChatHandler):
        DEFAULT_SYSTEM_MESSAGE = None
        CHAT_FORMAT = (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: "
            "{% for content in messages[0].content %}{% if content.type == 'image_url' %}"
            "{{ content.image_url if content.image_url is string else content.image_url.url }}{% endif %}{% endfor %}"
            "{% for content in messages[0].content %}{% if content.type == 'text' %}"
            "{{ content.text }}{% endif %}{% endfor %} ASSISTANT:"
        )

    model = llama_cpp.Llama(
        str(llm), chat_handler=Ours(str(mmproj), verbose=False), n_ctx=512, logits_all=True, verbose=False
    )
    url = "data:image/png;base64," + base64.b64encode(SQUARE.read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"\n{ask}"}]
    ends = llama_cpp.LogitsProcessorList([_no_end])
    made = model.create_chat_completion(
        messages=[{"role": "user", "content": parts}], temperature=0.0, max_tokens=NUM, logits_processor=ends
    )
    got = made["choices"][0]["message"]["content"]
    assert made["usage"]["completion_tokens"] >= 16
    assert got == spoken(source, llm, theirs), (got, spoken(source, llm, theirs), spoken(source, llm, right))


def _no_end(_: Any, scores: Any) -> Any:
    scores[512:] = -np.inf  # rows that no text has
    return scores


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_words_are_proved_in_llama_cpp(family: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "made", family, "full")
    proof = convert(folder / "trained", tmp_path / "pair", to="gguf", spec=asked(folder, family, "full", dtype="f32"))
    assert proof["proved"] and proof["llama_cpp"]["proved"], proof


@pytest.mark.parametrize("dtype", ["q5_k_m", "q4_k_m"])
def test_llama_cpps_own_mixtures_are_written_and_read(dtype: str, tmp_path: Path) -> None:
    from tests.convert.wide import wide_llava

    source = wide_llava(tmp_path / "hf")
    proof = convert(source, tmp_path / "pair", to="gguf", spec=ConvertSpec(dtype=dtype))
    assert proof["proved"] and 0.001 < proof["farthest"] < 0.12, proof
    llm, _ = files(tmp_path / "pair")
    kinds = {tensor.kind for tensor in read_gguf(llm)[1].values()}
    assert {"q5_k_m": "Q5_K", "q4_k_m": "Q4_K"}[dtype] in kinds and "Q6_K" in kinds
    assert sorted(path.name for path in (tmp_path / "pair").glob("*.gguf")) == sorted(
        [llm.name, files(llm.parent)[1].name]
    )
    assert convert(tmp_path / "pair", tmp_path / "back", to="hf", spec=ConvertSpec(dtype="float16"))["proved"]
