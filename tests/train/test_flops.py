"""Counted FLOPs are those of a hand's count and of torch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rayllava.families import FAMILIES
from rayllava.model.build import build
from rayllava.model.forward import LossModel, tensors
from rayllava.model.tuning import adapt
from rayllava.prompt.collate import collate, dummy
from rayllava.recipe import Full, LoRA, ModelSpec, Projector, ScaleSpec, TowerFull, TowerLoRA
from rayllava.records import Batch
from rayllava.train.flops import Cost, Work, peak_flops, peak_of
from tests.tiny import processor_spec
from tests.train.training import batch_of, example

SPEC = processor_spec()
SAMPLES = list(range(7))

TUNINGS: dict[str, Any] = {
    "projector": Projector(),
    "full": Full(),
    "lora": LoRA(r=8, dropout=0),
    "full, tower full": Full(vision=TowerFull()),
    "lora, tower lora": LoRA(r=8, dropout=0, vision=TowerLoRA(r=4, dropout=0)),
    "full, tower lora": Full(vision=TowerLoRA(r=4, dropout=0)),
}


def packed(samples: list[int]) -> Batch:
    return collate([example(sample, SPEC) for sample in samples], pad_token_id=SPEC.pad_token_id, packed=True)


@pytest.mark.parametrize("kind", ["padded", "packed", "packed, masked"])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_count_is_that_of_torchs_counter(parts: ModelSpec, tuning: str, kind: str) -> None:
    """Padding is computed too, so it is asked for here; in a packed row only eager attention computes every pair."""
    llava = build(parts.but(vision_feature_layer=-1), SPEC, seed=0)  # every block of the tower is needed
    llava.model.vision_tower.set_attn_implementation("eager")
    if kind != "packed":
        llava.model.language_model.set_attn_implementation("eager")
    adapt(llava, TUNINGS[tuning], FAMILIES["vicuna"], seed=0)
    batch = batch_of(SAMPLES) if kind == "padded" else packed(SAMPLES)
    # The other kernels of a CPU are one operation that torch does not count.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        LossModel(llava, SPEC)(**tensors(batch, torch.device("cpu"))).backward()
    rows, positions = batch.ids.shape
    pairs = Work.of([batch]).pairs if kind == "packed" else rows * positions**2
    ours = Cost.of(llava, SPEC).flops(
        tokens=rows * positions, pairs=pairs, targets=batch.num_targets, images=len(batch.pixels)
    )
    # Beside these torch counts the angles of the rotary embedding, and we the first gradient of an adapted tower.
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_work_is_what_examples_hold_padded_or_packed() -> None:
    lengths = [len(example(sample, SPEC).ids) for sample in SAMPLES]
    row, rows = packed(SAMPLES), batch_of(SAMPLES)
    wanted = Work(sum(lengths), sum(n * n for n in lengths), rows.num_targets, len(rows.pixels))
    assert Work.of([rows]) == Work.of([row, dummy(SPEC)]) == wanted
    assert Work.of([rows, row]).pairs == 2 * wanted.pairs
    assert Work.of([]) == Work.of([dummy(SPEC)]) == Work(0, 0, 0, 0)


@pytest.fixture(scope="module")
def llava_7b() -> Any:
    """Vicuna-7B under CLIP-L/14-336, as shapes alone."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    clip = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        llava: Any = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=clip, text_config=LlamaConfig(vocab_size=32064, **sizes))
        )
    return llava


SPEC_7B = SPEC.but(image_size=336, num_image_tokens=576)
LAYERS_7B = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
TOWER = 23 * (577 * 2 * 12 * 1024 * 1024 + 4 * 1024 * 577 * 577) + 576 * 2 * 3 * 14 * 14 * 1024
PROJECTOR = 576 * (4 * 1024 * 4096 + 6 * 4096 * 4096)


def test_a_7b_costs_what_a_hand_counts(llava_7b: Any) -> None:
    def cost(tuning: Any) -> Cost:
        adapt(llava_7b, tuning, FAMILIES["vicuna"], seed=0)
        return Cost.of(llava_7b, SPEC_7B)

    pair = 12 * 32 * 4096
    assert cost(Full()) == Cost(6 * LAYERS_7B, pair, 6 * 4096 * 32064, TOWER + PROJECTOR)
    assert cost(Projector()) == Cost(4 * LAYERS_7B, pair, 4 * 4096 * 32064, TOWER + PROJECTOR)
    assert (LAYERS_7B, TOWER + PROJECTOR) == (6_476_005_376, 433_679_593_472)
    # PaLM's 6 N + 12 L H Q T for one text of 2048 positions, N the weights that multiply a position.
    step = cost(Full()).flops(tokens=2048, pairs=2048**2, targets=0, images=0)
    assert step == 2048 * (6 * LAYERS_7B + 12 * 32 * 32 * 128 * 2048)


def test_a_tower_that_trains_costs_three_times_its_forward_pass(llava_7b: Any) -> None:
    adapt(llava_7b, Full(vision=TowerFull()), FAMILIES["vicuna"], seed=0)
    pixels = 576 * 2 * 3 * 14 * 14 * 1024  # no gradient for these
    first = 576 * 2 * 1024 * 4096  # a gradient that a frozen tower does not ask of the projector
    assert Cost.of(llava_7b, SPEC_7B).image == 3 * TOWER - pixels + PROJECTOR + first


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_peaks_are_known_by_a_gpus_name(name: str, tflops: float | None) -> None:
    assert peak_of(name) == tflops


def test_a_cpu_has_the_peak_that_the_recipe_says_or_none() -> None:
    cpu = torch.device("cpu")
    assert peak_flops(ScaleSpec(), cpu) is None
    assert peak_flops(ScaleSpec(peak_tflops=0.25), cpu) == 0.25e12
    with pytest.raises(ValueError, match="peak_tflops"):
        ScaleSpec(peak_tflops=0)
