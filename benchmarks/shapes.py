"""What the training benchmarks train: models of several shapes, and samples for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from samples import MAX_LENGTH, PICTURE, draw


class Shape(NamedTuple):
    """A model, and what is learned with it."""

    hidden: int
    inner: int
    layers: int
    heads: int
    vocab: int
    tower_hidden: int
    tower_layers: int
    tower_heads: int
    image: int
    patch: int
    shrink: int
    """How many times shorter pictures and texts are than LLaVA's."""
    step: int
    """Samples of an optimizer step."""
    rows: int
    """Samples of a padded pass."""
    packed: int
    """Most positions of a packed pass: fewer than the largest padded one has."""
    lr: float
    device: str
    dtype: str

    @property
    def num_image_tokens(self) -> int:
        return (self.image // self.patch) ** 2


SHAPES = {
    # The head is small because it is in a 7B: a thirtieth of the language model.
    "small": Shape(256, 688, 4, 8, 512, 128, 4, 4, 56, 7, 9, 32, 16, 2048, 1e-3, "cpu", "float32"),
    # Half of the layers of a 7B, for the float32 masters and moments of all do not fit beside activations on one GPU.
    "7b-half": Shape(4096, 11008, 16, 32, 32064, 1024, 24, 16, 336, 14, 1, 128, 8, 8192, 2e-5, "cuda", "bfloat16"),
    # A gigabyte of weights and moments, four in ten weights in the word tables.
    "gigabyte": Shape(512, 1376, 16, 8, 32000, 128, 4, 4, 56, 7, 9, 4, 4, 256, 1e-4, "cpu", "float32"),
    # The same path on a CPU in seconds.
    "trial": Shape(64, 176, 2, 4, 512, 32, 2, 4, 56, 7, 9, 16, 8, 256, 1e-3, "cpu", "float32"),
}


class Job(NamedTuple):
    shape: Shape
    folder: Path
    """With the model's parts."""
    steps: int = 1
    threads: int = 1
    """Of torch."""


def make_parts(job: Job) -> None:
    """Write a language model and a vision tower with random weights."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    if (job.folder / "vision" / "model.safetensors").exists():
        return
    shape = job.shape
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, shape.dtype))
    llm = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(llm).save_pretrained(job.folder / "llm")
    tower = CLIPVisionConfig(
        hidden_size=shape.tower_hidden,
        intermediate_size=4 * shape.tower_hidden,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads,
        image_size=shape.image,
        patch_size=shape.patch,
    )
    CLIPVisionModel(tower).save_pretrained(job.folder / "vision")


def model(job: Job) -> Any:
    from rayllava.recipe import ModelSpec

    return ModelSpec(llm=str(job.folder / "llm"), vision=str(job.folder / "vision"), family="vicuna")


def tuned(job: Job) -> Any:
    """Return transformers' LlavaForConditionalGeneration with what stage 2 trains; float32 on the CPU."""
    from rayllava.families import FAMILIES
    from rayllava.model.build import build
    from rayllava.model.tuning import tune
    from rayllava.recipe import Full

    llava = build(model(job), processor(job.shape), seed=42)
    tune(llava, Full(), FAMILIES["vicuna"], seed=42)
    return llava


def processor(shape: Shape) -> Any:
    from rayllava.recipe import ProcessorSpec

    assert shape.num_image_tokens == PICTURE // shape.shrink
    return ProcessorSpec(
        template="vicuna_v1",
        image_size=shape.image,
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
        num_image_tokens=shape.num_image_tokens,
        image_token_id=shape.vocab - 1,  # rows that the head has already, so that both sides' losses see the same
        pad_token_id=shape.vocab - 2,
        bos_token_id=1,
        eos_token_id=2,
        stop_token_ids=(2,),
        max_length=MAX_LENGTH // shape.shrink,
    )


def examples(shape: Shape, num: int) -> list[Any]:
    """Return encoded samples: words by Zipf's law, a picture at the front, loss on the latter half of the text."""
    from rayllava.records import IGNORE, Example

    spec = processor(shape)
    rng = np.random.default_rng(1)
    weights = 1 / (np.arange(shape.vocab - 5) + 10.0)
    made = []
    for number, (length, num_images) in enumerate(zip(*draw(num, shrink=shape.shrink), strict=True)):
        run = int(num_images) * shape.num_image_tokens
        ids = rng.choice(shape.vocab - 5, int(length), p=weights / weights.sum()).astype(np.int32) + 3
        ids[0], ids[1 : 1 + run] = 1, spec.image_token_id
        labels = ids.copy()
        labels[: 1 + run + (len(ids) - run) // 2] = IGNORE
        pixels = rng.integers(0, 256, (int(num_images), 3, shape.image, shape.image)).astype(np.uint8)
        made.append(Example(str(number), ids, labels, pixels))
    return made
