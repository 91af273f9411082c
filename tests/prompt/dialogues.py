"""Short ways to write dialogues in tests, and to read what an example teaches."""

from __future__ import annotations

from io import BytesIO
from random import Random

import numpy as np
from PIL import Image

from rayllava.prompt.encode import Processor
from rayllava.records import IGNORE, Example, Sample, Turn
from tests.prompt.vocabularies import WORDS

ROLES = {"s": "system", "h": "user", "g": "assistant"}


def png(width: int = 5, height: int = 4, *, seed: int = 0) -> bytes:
    content = BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(content, "PNG")
    return content.getvalue()


def sample(*turns: str, images: int = 0) -> Sample:
    """Return a sample of turns written as `h:question`, `g:answer`, `s:system`."""
    spoken = tuple(Turn(ROLES[turn[0]], turn[2:]) for turn in turns)  # type: ignore[arg-type]
    return Sample("a", spoken, tuple(png(seed=seed) for seed in range(images)))


def text(processor: Processor, example: Example) -> str:
    """Return everything that the model sees, control tokens by name, a picture as one `<image>`."""
    spec = processor.spec
    run = "<image>" * spec.num_image_tokens
    return processor.tokenizer.decode(example.ids.tolist(), controls=True).replace(run, "<image>")


def taught(processor: Processor, example: Example) -> list[str]:
    """Return the stretches of text that carry loss, each decoded behind what stands before it."""
    ids, loss = example.ids.tolist(), (example.labels != IGNORE).tolist()
    assert example.labels[loss].tolist() == example.ids[loss].tolist()
    stretches = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or loss[end] != loss[start]:
            if loss[start]:
                before = processor.tokenizer.decode(ids[:start], controls=True)
                stretches.append(processor.tokenizer.decode(ids[:end], controls=True).removeprefix(before))
            start = end
    return stretches


def random_dialogue(rng: Random, *, wild: bool = False) -> list[str]:
    """Return one to four rounds, the first often with a picture; `wild` ones hold blanks and newlines anywhere."""
    rounds = rng.randint(1, 4)
    turns = [f"{'hg'[n % 2]}:{_sentence(rng, wild=wild)}" for n in range(2 * rounds)]
    if rng.random() < 0.6:
        turns[0] = f"h:<image>\n{turns[0][2:]}"
    return turns


def _sentence(rng: Random, *, wild: bool) -> str:
    words = [rng.choice(WORDS) for _ in range(rng.randint(1, 12))]
    if wild:
        odd = ["\n", "\n\n", " ", "   ", "\t", "é", "猫", "🙂", "<", "</s", "▁", ":", "ASSISTANT:", "\r\n", "0x0A"]
        for _ in range(rng.randint(1, 6)):
            words.insert(rng.randint(0, len(words)), rng.choice(odd))
    return rng.choice(["", " "] if wild else [" "]).join(words) or "x"
