"""Quantised layers hold packed weights, and only where they should."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rayllava.model.quant import quantize
from tests.generate.llava import tiny_llava


@pytest.mark.parametrize(("kind", "dtype"), [("nf4", torch.uint8), ("int8", torch.int8)])
def test_language_model_weights_are_packed_and_answers_change_a_little(kind: str, dtype: torch.dtype) -> None:
    model = tiny_llava()
    packed = copy.deepcopy(model)
    names = quantize(packed, kind)
    assert len(names) == 2 * 7
    for name in names:
        assert packed.get_submodule(name).weight.dtype == dtype, name
    ids = torch.tensor([[1, 300, 301, 302, 303]])
    with torch.inference_mode():
        before, after = model(input_ids=ids).logits, packed(input_ids=ids).logits
    assert 0 < (before - after).abs().max() < 0.5 * before.abs().max()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_tower_projector_embeddings_and_head_stay_float(kind: str) -> None:
    model = tiny_llava()
    before = {k: v.clone() for k, v in model.state_dict().items() if "language_model.layers" not in k}
    quantize(model, kind)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert type(model.lm_head) is nn.Linear
    assert not model.training


def test_no_quantisation_leaves_the_model_alone() -> None:
    assert quantize(tiny_llava(), "none") == []


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(ValueError, match="quant=int3 is none of none, nf4, int8"):
        quantize(tiny_llava(), "int3")  # type: ignore[arg-type]
