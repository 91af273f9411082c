"""The parts a real user would download, made on the spot: a vision tower and a language model.

    training scans -> drawn afresh for every step -> labels per patch      -> vision/  CLIPVisionModel
    digits         -> typed drawings and dialogues -> next token           -> llm/     LlamaForCausalLM, tokenizer

The language model never sees a picture. It reads drawings typed with digits, as large language models have, and so
arrives knowing the questions but not the tower: aligning the two is what the quickstart's training does.
Both are toys that know ten digits; neither stands for what CLIP or Vicuna can do.
"""

import json
import logging
import math
import re
import shutil
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import torch
from sklearn.datasets import load_digits
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import OneCycleLR
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from rayllava.demo.pictures import (
    IMAGE,
    LAYOUTS,
    Layout,
    Scene,
    caption,
    dialogue,
    text_dialogue,
)

log = logging.getLogger(__name__)

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SIDE = 6
"""Patches along a side of the tower's input; two and three digits divide it evenly."""
PATCH = 8
BLANK = 10
"""Label of a patch without a digit."""
_PLACES = tuple(dict.fromkeys(place for layout in LAYOUTS for place in layout.places))
_IGNORE = -100


def warm_up(
    pictures_dir: Path,
    out_dir: Path,
    *,
    seed: int = 0,
    threads: int = 2,
    say: Callable[[str], None] = log.info,
) -> dict[str, float]:
    """Make `out_dir/vision` and `out_dir/llm` and return how well each learned. The folder appears complete or not at all.

    The held-out scans named in `pictures_dir` are looked at by neither part.
    """
    part_dir = out_dir.with_name(out_dir.name + ".part")
    shutil.rmtree(part_dir, ignore_errors=True)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            scores = _warm_up_vision(pictures_dir, part_dir / "vision", say=say)
            torch.manual_seed(seed)
            scores |= _warm_up_llm(part_dir / "llm", rng=Random(seed), say=say)
    finally:
        torch.set_num_threads(threads_before)
    part_dir.rename(out_dir)
    return scores


def _warm_up_vision(
    pictures_dir: Path, out_dir: Path, *, say: Callable[[str], None], num_steps: int = 1500, batch: int = 16
) -> dict[str, float]:
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
        projection_dim=64,
    )
    tower = _newborn_tower(config)
    # LLaVA reads the last layer but one, so that is where the labels are taught; the last layer stays as it was born.
    head = nn.Linear(config.hidden_size, BLANK + 1 + len(_PLACES) + 1)
    optim = _Optimizer(tower, head, lr=4e-3, num_steps=num_steps)
    drawn = _drawn_batches(pictures_dir, batch=batch)
    hits: list[float] = []
    for step in range(1, num_steps + 1):
        pixels, labels = next(drawn)
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]  # (B, SIDE*SIDE, D)
        digit, place = head(hidden).split([BLANK + 1, len(_PLACES) + 1], dim=-1)
        digit_loss = F.cross_entropy(digit.flatten(0, 1), labels[..., 0].flatten())
        loss = digit_loss + 0.5 * F.cross_entropy(place.flatten(0, 1), labels[..., 1].flatten())
        optim.step(loss)
        hits.append(_accuracy(digit, labels[..., 0]))
        if step % 300 == 0:
            say(
                f"vision step {step} of {num_steps}: loss {digit_loss.item():.3f}, digit patches {np.mean(hits[-300:]):.3f}"
            )
    tower.save_pretrained(out_dir)
    _image_processor(config.image_size).save_pretrained(out_dir)
    return {"vision_patch_accuracy": float(np.mean(hits[-300:]))}


def _newborn_tower(config: CLIPVisionConfig) -> CLIPVisionModel:
    """Build a tower that knows where its patches lie: from CLIP's own tiny start a small one takes far longer to learn."""
    tower = CLIPVisionModel(config)
    frequency = math.pi / 2 * 10 ** -torch.arange(0, 1, 4 / config.hidden_size)  # (D / 4,)
    angle = torch.arange(SIDE)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (SIDE, D / 2)
    rows, columns = wave.repeat_interleave(SIDE, dim=0), wave.repeat(SIDE, 1)
    with torch.no_grad():
        tower.embeddings.position_embedding.weight[1:] = 2 * torch.cat([rows, columns], dim=1)
        for name, weight in tower.named_parameters():
            if name.endswith("patch_embedding.weight") or (".layers." in name and weight.ndim == 2):
                nn.init.xavier_uniform_(weight.view(len(weight), -1))
    return tower


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    is_digit = labels != BLANK
    return (logits.argmax(-1) == labels)[is_digit].float().mean().item()


def _drawn_batches(pictures_dir: Path, *, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalised pixels (B, 3, S, S) and patch labels (B, SIDE*SIDE), one layout a batch."""
    held_out = set(json.loads((pictures_dir / "provenance.json").read_text(encoding="utf-8"))["held_out"])
    digits = load_digits()
    kept = [i for i in range(len(digits.target)) if i not in held_out]
    scans = torch.tensor(digits.images[kept] / 16, dtype=torch.float32)[:, None]  # (N, 1, 8, 8)
    target = torch.tensor(digits.target[kept])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    while True:
        for layout in LAYOUTS:
            rows, columns = layout.rows, layout.columns
            cell = SIDE * PATCH // max(rows, columns)
            picked = torch.randint(len(target), (batch * rows * columns,))
            ink = F.grid_sample(scans[picked], _jitter(len(picked), cell), mode="bicubic", align_corners=False)
            ink = ink.clamp(0, 1).view(batch, rows, columns, cell, cell).transpose(2, 3)
            ink = ink.reshape(batch, 1, rows * cell, columns * cell)
            paper = 0.82 + 0.18 * torch.rand(batch, 3, 1, 1)
            colour = 0.4 * torch.rand(batch, 3, 1, 1)
            painted = paper + (colour - paper) * ink
            top, left = ((SIDE * PATCH - side * cell) // 2 for side in (rows, columns))
            pixels = mean.repeat(batch, 1, SIDE * PATCH, SIDE * PATCH)
            pixels[:, :, top : top + rows * cell, left : left + columns * cell] = painted
            pixels = pixels + 0.02 * torch.randn_like(pixels)
            yield (pixels - mean) / std, _patch_labels(target[picked].view(batch, rows * columns), layout)


def _jitter(num: int, cell: int) -> Tensor:
    """Sampling grids (N, cell, cell, 2) that grow, shear, turn and move a scan a little within its cell."""
    grow = 1.0 + 0.3 * torch.rand(num, 2)
    skew = 0.15 * torch.randn(num, 2)
    move = (2 * torch.rand(num, 2) - 1) * 0.2
    theta = torch.stack([grow[:, 0], skew[:, 0], move[:, 0], skew[:, 1], grow[:, 1], move[:, 1]], dim=1)
    return F.affine_grid(theta.view(num, 2, 3), [num, 1, cell, cell], align_corners=False)


def _patch_places(layout: Layout) -> list[int | None]:
    """Say for each of the tower's patches, in raster order, which place of the layout it shows."""
    patches = SIDE // max(layout.rows, layout.columns)
    top, left = (SIDE - layout.rows * patches) // 2, (SIDE - layout.columns * patches) // 2
    places: list[int | None] = []
    for y in range(SIDE):
        for x in range(SIDE):
            row, column = (y - top) // patches, (x - left) // patches
            inside = 0 <= row < layout.rows and 0 <= column < layout.columns
            places.append(row * layout.columns + column if inside else None)
    return places


def _patch_labels(digits: Tensor, layout: Layout) -> Tensor:
    """Digit and place of every patch, (B, SIDE*SIDE, 2)."""
    at = [-1 if place is None else place for place in _patch_places(layout)]
    names = torch.tensor([*(_PLACES.index(place) for place in layout.places), len(_PLACES)])
    return torch.stack([F.pad(digits, (0, 1), value=BLANK)[:, at], names[at].expand(len(digits), -1)], dim=-1)


def _image_processor(image_size: int) -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(OPENAI_CLIP_MEAN),
        image_std=list(OPENAI_CLIP_STD),
    )


def _warm_up_llm(
    out_dir: Path, *, rng: Random, say: Callable[[str], None], num_steps: int = 450, batch: int = 8
) -> dict[str, float]:
    tokenizer = _train_tokenizer(rng)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    llm = LlamaForCausalLM(config)
    embed = llm.get_input_embeddings()
    optim = _Optimizer(llm, lr=4e-3, num_steps=num_steps)
    losses: list[float] = []
    for step in range(1, num_steps + 1):
        notes = 0.85 if step <= num_steps * 0.4 else 0.1
        ids, blends, labels = _pad([_text(tokenizer, rng, notes=notes) for _ in range(batch)])
        # Padding stands on the right and causal attention never looks there: no mask is needed.
        embeds = embed(ids) + embed(blends) * (blends > 0)[..., None]  # (B, T, D)
        logits = llm(inputs_embeds=embeds).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORE)
        optim.step(loss)
        losses.append(loss.item())
        if step % 90 == 0:
            say(f"language step {step} of {num_steps}: loss {np.mean(losses[-90:]):.3f}")
    llm.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return {"llm_loss": float(np.mean(losses[-90:]))}


def _text(tokenizer: PreTrainedTokenizerFast, rng: Random, *, notes: float) -> list[tuple[int, int, int]]:
    """One text of the domain, as (id, id blended into it or 0, label) for every position."""
    layout = rng.choices(LAYOUTS, [layout.share for layout in LAYOUTS])[0]
    scene = Scene(layout, tuple(rng.randrange(10) for _ in layout.places))
    kind = rng.random()
    if kind < 0.15:
        pieces = [("<image>", False), (caption(scene) + "\n", True)]
    elif kind < 0.15 + notes:
        pieces = [("<image>", False), *_notes(scene, rng)]
    elif kind < 0.95:
        pieces = _dialogue_pieces(IMAGE, dialogue(scene, rng))
    else:
        pieces = _dialogue_pieces("", text_dialogue(rng))
    text = [(tokenizer.bos_token_id, 0, _IGNORE)]
    for piece, is_target in pieces:
        for part in re.split("(<image>)", piece):
            if part == "<image>":
                text += [(i, blend, _IGNORE) for i, blend in _blended_scene(scene, tokenizer, rng)]
            else:
                ids = tokenizer.encode(part, add_special_tokens=False)
                text += [(i, 0, i if is_target else _IGNORE) for i in ids]
    return text


def _blended_scene(
    scene: Scene, tokenizer: PreTrainedTokenizerFast, rng: Random
) -> Iterator[tuple[int, int]]:
    """Tell a scene in words, a digit and its place blended for each of the tower's patches; some are missing."""
    for at in _patch_places(scene.layout):
        if at is None or rng.random() < 0.15:
            yield tokenizer.convert_tokens_to_ids("."), 0
        else:
            words = (f"▁{scene.digits[at]}", f"▁{scene.layout.places[at]}")
            yield tuple(tokenizer.convert_tokens_to_ids(words))


def _notes(scene: Scene, rng: Random) -> list[tuple[str, bool]]:
    """Note what stands where, what occurs and what is even: short facts teach looking up faster than questions do."""
    facts = [(f" {place}", f" {digit}") for place, digit in zip(scene.layout.places, scene.digits, strict=True)]
    facts += [(f" {digit}", " yes" if digit in scene.digits else " no") for digit in rng.sample(range(10), 6)]
    num_odd = sum(digit % 2 for digit in scene.digits)
    facts += [(" even", f" {len(scene.digits) - num_odd}"), (" odd", f" {num_odd}")]
    if scene.layout.rows == 1:
        facts.append((" number", " " + "".join(map(str, scene.digits))))
    rng.shuffle(facts)
    return [piece for subject, fact in facts for piece in ((subject, False), (fact, True), (",", False))]


def _dialogue_pieces(opening: str, turns: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    pieces = [(f"{SYSTEM} USER: {opening}{turns[0][0]} ASSISTANT:", False), (f" {turns[0][1]}</s>", True)]
    for question, answer in turns[1:]:
        pieces += [(f"USER: {question} ASSISTANT:", False), (f" {answer}</s>", True)]
    return pieces


def _train_tokenizer(rng: Random) -> PreTrainedTokenizerFast:
    """Train a small BPE shaped like Llama 2's: <unk> <s> </s>, a token a byte, `▁` for a blank.

    Digits and full stops stay single, so that a typed drawing has a token a patch.
    """
    blanks = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    single = pre_tokenizers.Split(Regex(r"▁?[0-9]|[.,?]"), "isolated")
    apart = pre_tokenizers.Sequence([blanks, single])
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = apart
    alphabet = [*"▁", *string.ascii_letters, *string.digits, *string.punctuation]
    draft.train_from_iterator(_tokenizer_texts(rng), trainers.BpeTrainer(vocab_size=640, initial_alphabet=alphabet))
    learned = json.loads(draft.to_str())["model"]

    special = ["<unk>", "<s>", "</s>"]
    words = [
        *special,
        *(f"<0x{value:02X}>" for value in range(256)),
        *sorted(learned["vocab"], key=learned["vocab"].get),
    ]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = apart
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _tokenizer_texts(rng: Random) -> Iterator[str]:
    """What the tokenizer is fitted to; newlines are left out and become byte tokens, as in Llama 2."""
    for _ in range(200):
        for layout in LAYOUTS:
            scene = Scene(layout, tuple(rng.randrange(10) for _ in layout.places))
            pieces = _dialogue_pieces("", dialogue(scene, rng)) + _dialogue_pieces("", text_dialogue(rng))
            for piece, _ in pieces:
                yield from piece.replace("</s>", "").split("\n")
            yield caption(scene)
            yield from (f" {place}" for place in layout.places)


def _pad(texts: list[list[tuple[int, int, int]]]) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(map(len, texts))
    padded = torch.tensor([text + [(0, 0, _IGNORE)] * (longest - len(text)) for text in texts])
    return padded.unbind(-1)  # three of (B, T)


class _Optimizer:
    """Muon for the layers' matrices and AdamW for the rest, both on one warm-up and cosine."""

    def __init__(self, *modules: nn.Module, lr: float, num_steps: int) -> None:
        named = [pair for module in modules for pair in module.named_parameters()]
        self.params = [param for _, param in named]
        matrices = [param for name, param in named if "layers." in name and param.ndim == 2]
        rest = [param for name, param in named if not ("layers." in name and param.ndim == 2)]
        muon = Muon(matrices, lr=2 * lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        self.optims = [muon, AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
        self.schedules = [
            OneCycleLR(
                optim,
                max_lr=optim.defaults["lr"],
                total_steps=num_steps + 1,
                pct_start=0.1,
                cycle_momentum=False,
            )
            for optim in self.optims
        ]

    def step(self, loss: Tensor) -> None:
        for param in self.params:
            param.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for optim, schedule in zip(self.optims, self.schedules, strict=True):
            optim.step()
            schedule.step()
