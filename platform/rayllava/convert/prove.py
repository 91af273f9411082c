"""Two checkpoints, one model: what a conversion compares before it may say that it worked.

    SRC --our readers--------------> tensors, and logits of fixed prompts --+
    DST --its layout's own reader--> tensors, and logits of the same -------+--> proof.json

A Hugging Face folder is asked through transformers alone, LlavaForConditionalGeneration and LlavaProcessor as anybody
would call them; where that takes more memory than a layer, our reader hands transformers its tensors. Only one side
is in memory at a time.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayllava.checkpoint.layouts import LAYOUTS, TABLES, StoredModel
from rayllava.checkpoint.shards import raw
from rayllava.model.normalise import normalise
from rayllava.model.streamed import streamed
from rayllava.prompt.encode import Processor
from rayllava.recipe import ProcessorSpec
from rayllava.records import IMAGE_MARK, Sample, Turn

IMAGE = -200
"""What stands for an image token where two vocabularies are compared."""

_SMALL = 1 << 26
"""Numbers of a model that is loaded whole."""
LAST = 32
"""Positions of a prompt whose logits are compared."""


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
    """(T,), image tokens as IMAGE"""
    pixels: Tensor | None
    """(N, 3, S, S), normalised"""
    logits: Tensor
    """(L, V) float32, of the last L <= LAST positions, which attend to all others"""


def compare_logits(
    prompts: Sequence[Prompt], a: Sequence[Seen], b: Sequence[Seen], *, rows: int
) -> dict[str, dict[str, Any]]:
    """Return per prompt how far two sides are apart in the first `rows` of the vocabulary.

    That is infinity where they read other tokens.
    """
    found = {}
    for prompt, one, two in zip(prompts, a, b, strict=True):
        same = torch.equal(one.ids, two.ids)
        found[prompt.name] = {
            "num_tokens": len(one.ids),
            "ids_equal": same,
            "max_abs_pixel_diff": _apart(one.pixels, two.pixels),
            "max_abs_logit": float(one.logits[:, :rows].abs().max()),
            "max_abs_logit_diff": _apart(one.logits[:, :rows], two.logits[:, :rows]) if same else math.inf,
        }
    return found


def compare_tensors(a: StoredModel, b: StoredModel, *, tolerance: float = 0.0) -> dict[str, Any]:
    """Return whether the second holds what the first does, bit for bit, and how many tensors that are.

    Rows of the vocabulary that the first has none of are not looked at. With a `tolerance`, `different` are those
    that are farther apart than that share of the first's length.
    """
    tied = a.config.text_config.tie_word_embeddings
    names = sorted(name for name in a.weights.keys() | b.weights.keys() if not (tied and name == TABLES[1]))
    if tolerance:
        farthest = {name: _distance(a, b, name) for name in names}
        apart = [name for name, distance in farthest.items() if not distance <= tolerance]
        found: dict[str, Any] = {"num_tensors": len(names), "bit_equal": False, "farthest": max(farthest.values())}
    else:
        apart = [name for name in names if _digest(a, name, a) != _digest(b, name, a)]
        found = {"num_tensors": len(names), "bit_equal": not apart}
    return found | {"tensors_agree": not apart} | ({"different": apart[:20]} if apart else {})


def our_side(stored: StoredModel, spec: ProcessorSpec, prompts: Sequence[Prompt]) -> list[Seen]:
    """Return what our code makes of prompts, in float32 on the CPU."""
    processor, ids, pixels = Processor(spec, stored.tokenizer_dir), [], []
    for prompt in prompts:
        marks = (IMAGE_MARK + "\n") * len(prompt.images)
        sample = Sample(prompt.name, (Turn("user", marks + prompt.text),), prompt.images)
        example = processor.encode(sample, open_turn=True)
        ids.append(torch.from_numpy(example.ids).long())
        squares = torch.from_numpy(example.pixels)  # (N, 3, S, S)
        pixels.append(normalise(squares, spec, dtype=torch.float32) if len(squares) else None)
    return _seen(streamed(stored), ids, pixels, spec.image_token_id)


def plain_side(folder: Path, prompts: Sequence[Prompt], other: Sequence[Seen]) -> list[Seen]:
    """Return what transformers alone makes of prompts, in float32 on the CPU.

    Where the folder has no chat template it is given the other side's ids, and prepares the pictures only.
    """
    from PIL import Image
    from transformers import LlavaProcessor

    processor: Any = LlavaProcessor.from_pretrained(folder, backend="pil")
    ids, pixels = [], []
    image = processor.image_token_id
    for prompt, seen in zip(prompts, other, strict=True):
        images = [Image.open(io.BytesIO(image)) for image in prompt.images]
        if processor.chat_template is None:
            ids.append(seen.ids.masked_fill(seen.ids == IMAGE, image))
            pixels.append(processor.image_processor(images, return_tensors="pt")["pixel_values"] if images else None)
            continue
        parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": prompt.text}]
        words = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        made = processor(text=words, images=images or None, return_tensors="pt")
        ids.append(made["input_ids"][0])
        pixels.append(made.get("pixel_values"))
    return _seen(_plain_model(folder), ids, pixels, image)


def _plain_model(folder: Path) -> Any:
    """Return the model as transformers loads it, in float32; a large one with its layers read when they run.

    Of that, transformers says that every tensor has its place, and computes with them; our reader hands them over.
    """
    from transformers import LlavaForConditionalGeneration

    stored = LAYOUTS["hf"].read(folder)
    if sum(math.prod(held.shape) for held in stored.weights.values()) <= _SMALL:
        return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    loader: Any = LlavaForConditionalGeneration
    _, report = loader.from_pretrained(folder, dtype="auto", device_map={"": "meta"}, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ValueError(f"DST: transformers finds {len(report[kind])} {kind.replace('_', ' ')}")
    return streamed(stored)


def fixed_prompts() -> list[Prompt]:
    """Return a question without a picture, with a wide, a tall and a square one drawn by a formula, and with two."""
    sizes = {"wide": (61, 37), "tall": (40, 71), "square": (64, 64)}
    pictures = {name: _picture(*size) for name, size in sizes.items()}
    ask = "What is shown in this image?\nAnswer briefly."
    return [
        Prompt("words", "How many days has a week?"),
        *(Prompt(name, ask, (picture,)) for name, picture in pictures.items()),
        Prompt("two", "Which of the two images is brighter?", (pictures["wide"], pictures["square"])),
    ]


def _seen(model: Any, ids: Sequence[Tensor], pixels: Sequence[Tensor | None], image: int) -> list[Seen]:
    """Run the prompts one by one: together they would need more memory than a layer does."""
    seen = []
    for one, pictures in zip(ids, pixels, strict=True):
        with torch.inference_mode():
            state = model.model(input_ids=one.unsqueeze(0), pixel_values=pictures, use_cache=False).last_hidden_state
            logits = model.lm_head(state[0, -LAST:])  # (L, V)
        seen.append(Seen(one.masked_fill(one == image, IMAGE), pictures, logits.float()))
    return seen


def _apart(one: Tensor | None, two: Tensor | None) -> float:
    if one is None or two is None:
        return 0.0 if one is two else math.inf
    return float((one - two).abs().max()) if one.shape == two.shape else math.inf


def _distance(a: StoredModel, b: StoredModel, name: str) -> float:
    """Return the length of the difference of two tensors as a share of the first's."""
    if name not in a.weights or name not in b.weights:
        return math.inf
    one = a.weights[name].read().float()
    two = b.weights[name].read().float()[: len(one)]
    if one.shape != two.shape:
        return math.inf
    return float((one - two).norm() / one.norm().clamp_min(1e-30)) if one.norm() > 0 else float(two.norm())


def _digest(stored: StoredModel, name: str, like: StoredModel) -> str:
    """Return a tensor's digest, type and shape; of a table as many rows as `like` has."""
    if name not in stored.weights:
        return "missing"
    tensor = stored.weights[name].read()
    if name in TABLES and name in like.weights:
        tensor = tensor[: like.weights[name].shape[0]]
    return f"{hashlib.blake2b(raw(tensor), digest_size=16).hexdigest()} {tensor.dtype} {tuple(tensor.shape)}"


def _picture(width: int, height: int) -> bytes:
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[:height, :width]
    channels = [x * 255 // width, y * 255 // height, (x * 7 + y * 13) % 256]
    file = io.BytesIO()
    Image.fromarray(np.stack(channels, -1).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
