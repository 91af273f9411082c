"""Two folders, one model: what a conversion compares before it may say that it worked.

    SRC --our readers------> tensors, and logits of fixed prompts --+
    DST --transformers alone-> tensors, and logits of the same -----+--> proof.json

The other side is none of our code: LlavaForConditionalGeneration and LlavaProcessor as anybody would call them.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayllava.checkpoint.layouts import StoredModel
from rayllava.model.normalise import normalise
from rayllava.model.restore import restore
from rayllava.prompt.encode import Processor
from rayllava.recipe import ProcessorSpec
from rayllava.records import IMAGE_MARK, Sample, Turn

BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest logit difference by the type that weights were rounded to, as a share of the largest logit."""


@dataclass(frozen=True)
class Prompt:
    """A question whose logits are compared."""

    name: str
    text: str
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What one side made of a prompt."""

    ids: Tensor
    """(1, T)"""
    pixels: Tensor | None
    """(N, 3, S, S), normalised"""
    logits: Tensor
    """(T, V) float32"""


Side = Callable[[Prompt, Seen | None], Seen]
"""Reads a prompt. The second argument is what the other side saw, for a side that has no words of its own."""


def compare_logits(a: Side, b: Side, prompts: Iterable[Prompt]) -> dict[str, dict[str, Any]]:
    """Return per prompt how far the two sides are apart; infinity where they read other tokens."""
    rows = {}
    for prompt in prompts:
        one = a(prompt, None)
        two = b(prompt, one)
        same = torch.equal(one.ids, two.ids)
        rows[prompt.name] = {
            "num_tokens": one.ids.shape[1],
            "ids_equal": same,
            "max_abs_pixel_diff": _apart(one.pixels, two.pixels),
            "max_abs_logit": float(one.logits.abs().max()),
            "max_abs_logit_diff": _apart(one.logits, two.logits) if same else math.inf,
        }
    return rows


def compare_tensors(a: StoredModel, b: StoredModel) -> dict[str, Any]:
    """Return whether the two hold the same tensors bit for bit, and how many."""
    one, two = _digests(a), _digests(b)
    return {"num_tensors": len(one), "bit_equal": one == two}


def our_side(stored: StoredModel, spec: ProcessorSpec) -> Side:
    """Return the side that reads with our code, in float32 on the CPU."""
    processor, model = Processor(spec, stored.tokenizer_dir), restore(stored, dtype=torch.float32)

    def see(prompt: Prompt, other: Seen | None) -> Seen:
        marks = (IMAGE_MARK + "\n") * len(prompt.images)
        sample = Sample(prompt.name, (Turn("user", marks + prompt.text),), prompt.images)
        example = processor.encode(sample, open_turn=True)
        ids = torch.from_numpy(example.ids).long().unsqueeze(0)  # (1, T)
        squares = torch.from_numpy(example.pixels)  # (N, 3, S, S)
        pixels = normalise(squares, spec, dtype=torch.float32) if len(squares) else None
        return Seen(ids, pixels, _logits(model, ids, pixels))

    return see


def plain_side(folder: Path) -> Side:
    """Return the side that reads with transformers alone, in float32 on the CPU.

    Where the folder has no chat template it is given the other side's ids, and prepares the pictures only.
    """
    from PIL import Image
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor: Any = LlavaProcessor.from_pretrained(folder, backend="pil")

    def see(prompt: Prompt, other: Seen | None) -> Seen:
        images = [Image.open(io.BytesIO(image)) for image in prompt.images]
        if processor.chat_template is None and other is not None:
            pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"] if images else None
            return Seen(other.ids, pixels, _logits(model, other.ids, pixels))
        parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": prompt.text}]
        words = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        made = processor(text=words, images=images or None, return_tensors="pt")
        pixels = made.get("pixel_values")
        return Seen(made["input_ids"], pixels, _logits(model, made["input_ids"], pixels))

    return see


def fixed_prompts() -> list[Prompt]:
    """Return a question without a picture, and with a wide, a tall and a square one drawn by a formula."""
    sizes = {"wide": (61, 37), "tall": (40, 71), "square": (64, 64)}
    ask = "What is shown in this image?\nAnswer briefly."
    return [
        Prompt("words", "How many days has a week?"),
        *(Prompt(name, ask, (_picture(*size),)) for name, size in sizes.items()),
    ]


def _logits(model: Any, ids: Tensor, pixels: Tensor | None) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, pixel_values=pixels).logits[0].float()


def _apart(one: Tensor | None, two: Tensor | None) -> float:
    if one is None or two is None:
        return 0.0 if one is two else math.inf
    return float((one - two).abs().max()) if one.shape == two.shape else math.inf


def _digests(stored: StoredModel) -> dict[str, str]:
    tied = stored.config.tie_word_embeddings
    found = {}
    for name, tensor in stored.tensors():
        if tied and name == "lm_head.weight":
            continue
        flat = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        found[name] = (
            hashlib.blake2b(flat.data, digest_size=16).hexdigest() + f" {tensor.dtype} {tuple(tensor.shape)}"
        )
    return found


def _picture(width: int, height: int) -> bytes:
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[:height, :width]
    channels = [x * 255 // width, y * 255 // height, (x * 7 + y * 13) % 256]
    file = io.BytesIO()
    Image.fromarray(np.stack(channels, -1).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
