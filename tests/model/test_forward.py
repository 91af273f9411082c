"""Examples packed into one row compute what they compute in rows of their own, and never see each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayllava.model.build import build
from rayllava.model.forward import LossModel, tensors
from rayllava.prompt.collate import collate
from rayllava.recipe import ModelSpec
from rayllava.records import IGNORE, Batch, Example
from tests.tiny import processor_spec

SPEC = processor_spec()
CPU = torch.device("cpu")
LLMS = ["llama", "internlm", "phi3", "phi3-sliding"]


@pytest.fixture(scope="module", params=[f"{llm}/{attn}" for llm in LLMS for attn in ("sdpa", "eager")])
def model(request: pytest.FixtureRequest, parts: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> LossModel:
    llm, attention = request.param.split("/")
    if llm != "llama":
        parts = parts.but(llm=str(write_llm(llm, tmp_path_factory.mktemp(llm))))
        parts = parts.but(family="phi3" if "phi3" in llm else "vicuna")
    llava = build(parts, SPEC, seed=0)
    llava.model.language_model.set_attn_implementation(attention)
    return LossModel(llava, SPEC)


def write_llm(kind: str, folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 330,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(1)
    if kind == "internlm":
        LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True)).save_pretrained(folder)
    else:
        window = 5 if kind == "phi3-sliding" else None
        Phi3ForCausalLM(Phi3Config(**sizes, sliding_window=window)).save_pretrained(folder)
    return folder


def example(seed: int, *, num_images: int, length: int) -> Example:
    rng = np.random.default_rng(seed)
    ids = rng.integers(260, 330, size=length).astype(np.int32)
    run = np.full(num_images * SPEC.num_image_tokens, SPEC.image_token_id, dtype=np.int32)
    labels = np.where(np.arange(length) < length // 3, IGNORE, ids).astype(np.int32)
    return Example(
        str(seed),
        ids=np.concatenate([ids[:1], run, ids[1:]]),
        labels=np.concatenate([labels[:1], np.full_like(run, IGNORE), labels[1:]]),
        pixels=rng.integers(0, 256, size=(num_images, 3, 28, 28)).astype(np.uint8),
    )


MIXED = [
    example(seed, num_images=num_images, length=length)
    for seed, (num_images, length) in enumerate([(1, 9), (0, 14), (2, 21), (0, 3), (1, 12)])
]


def batch(examples: list[Example], *, packed: bool = False) -> Batch:
    return collate(examples, pad_token_id=SPEC.pad_token_id, packed=packed)


def loss_and_gradients(model: LossModel, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = torch.stack([model(**tensors(b, CPU)) for b in batches]).sum()
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("examples", [MIXED, [e for e in MIXED if not len(e.pixels)], MIXED[2:3]])
def test_a_packed_row_has_the_loss_and_gradients_of_its_examples(model: LossModel, examples: list[Example]) -> None:
    packed, got = loss_and_gradients(model, [batch(examples, packed=True)])
    for batches in ([batch(examples)], [batch([one]) for one in examples]):
        loss, want = loss_and_gradients(model, batches)
        assert packed == pytest.approx(loss, rel=1e-6)
        assert got.keys() == want.keys()
        worst = max(float((got[name] - want[name]).abs().max()) for name in want)
        scale = max(float(gradient.abs().max()) for gradient in want.values())
        assert worst <= 1e-5 * scale, f"gradients differ by {worst:.1e} of {scale:.1e}"


def test_what_one_example_says_and_shows_moves_no_bit_of_another(model: LossModel) -> None:
    ends = np.cumsum([len(e.ids) for e in MIXED])
    before = hidden(model, MIXED)
    for number, changed in enumerate(MIXED):
        ids = np.where(changed.ids == SPEC.image_token_id, changed.ids, 260 + (changed.ids + 7) % 70).astype(np.int32)
        others = [*MIXED[:number], replace(changed, ids=ids, pixels=255 - changed.pixels), *MIXED[number + 1 :]]
        own = slice(ends[number] - len(ids), ends[number])
        moved = (hidden(model, others) != before).any(dim=-1)[0]
        assert moved[own].all()
        moved[own] = False
        assert not moved.any()


def hidden(model: LossModel, examples: list[Example]) -> torch.Tensor:
    given = tensors(batch(examples, packed=True), CPU)
    del given["labels"]
    with torch.no_grad():
        return model.hidden(**given)


def test_padded_rows_are_what_transformers_itself_makes_of_them(model: LossModel) -> None:
    given = tensors(batch([e for e in MIXED if not len(e.pixels)]), CPU)
    mask = (torch.arange(given["ids"].shape[1]) < given["lengths"].unsqueeze(1)).long()
    with torch.no_grad():
        ours = model.hidden(given["ids"], given["positions"], given["lengths"], given["pixels"])
        theirs = model.llava.model.language_model(input_ids=given["ids"], attention_mask=mask, use_cache=False)
    assert torch.equal(ours, theirs.last_hidden_state)
