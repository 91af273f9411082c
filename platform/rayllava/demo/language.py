"""The quickstart's language model: a small Llama taught on text of the domain. It never sees a picture.

    scene -> shorthand, patch by patch: "a3 a3 b7 b7 ..."  ->  caption, notes, dialogue about it

In the shorthand a letter is a place and the digit stands beside it, one token a patch: what a large language model
knows of the world from reading, this one knows of scenes. So it arrives knowing the questions, but not the tower:
aligning the two is what the quickstart's training does.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rayllava.demo.optimizer import Optimizer
from rayllava.demo.pictures import GRID, LAYOUTS, PAIR, Scene, caption, dialogue, presence_questions, text_dialogue
from rayllava.demo.tower import patch_places
from rayllava.prompt.chat import TEMPLATES
from rayllava.records import IGNORE

SYSTEM = TEMPLATES["vicuna_v1"].default_system
_LETTERS = {GRID: "abcd", PAIR: "ef"}


def warm_up_language(
    out_dir: Path, *, rng: Random, say: Callable[[str], None], num_steps: int = 850, batch: int = 12
) -> float:
    """Write a LlamaForCausalLM and its tokenizer; return its mean loss at the end."""
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
    optimizer = Optimizer(llm, lr=4e-3, num_steps=num_steps)
    losses: list[float] = []
    for step in range(1, num_steps + 1):
        ids, labels = _pad([_text(tokenizer, rng, progress=step / num_steps) for _ in range(batch)])
        # Padding stands on the right and causal attention never looks there: no mask is needed.
        logits = llm(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        optimizer.step(loss)
        losses.append(loss.item())
        if step % 100 == 0:
            say(f"language model: step {step} of {num_steps}, loss {np.mean(losses[-100:]):.3f}")
    llm.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return float(np.mean(losses[-100:]))


def _text(tokenizer: PreTrainedTokenizerFast, rng: Random, *, progress: float) -> tuple[list[int], list[int]]:
    """One text about a scene in shorthand, as ids and labels.

    First captions and notes, then bare questions, then dialogues: each prepares what the next one needs. Without the
    steps between, and questions about presence above all, some skills come late or never.
    """
    layout = rng.choices(LAYOUTS, [layout.share for layout in LAYOUTS])[0]
    scene = Scene(layout, tuple(rng.randrange(10) for _ in layout.places))
    typed, kind = _shorthand(scene, rng), rng.random()
    if kind < 0.12:
        pieces = [(typed, False), (caption(scene) + "\n", True)]
    elif progress <= 0.35 or kind < 0.17:
        pieces = [(typed, False), *_notes(scene, rng)]
    elif progress <= 0.7 and kind < 0.75:
        pieces = [(typed, False), *_bare(presence_questions(scene, rng) if kind < 0.55 else dialogue(scene, rng))]
    elif kind < 0.95:
        pieces = _dialogue_pieces(typed + "\n", dialogue(scene, rng))
        if rng.random() < 0.5:
            pieces[0] = (pieces[0][0].removeprefix(SYSTEM + " "), False)
    else:
        pieces = _dialogue_pieces("", text_dialogue(rng))
    ids, labels = [tokenizer.bos_token_id], [IGNORE]
    for text, is_target in pieces:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        labels += piece if is_target else [IGNORE] * len(piece)
    return ids, labels


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


def _bare(turns: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    return [
        piece
        for question, answer in turns
        for piece in ((f" {question.splitlines()[0]}", False), (f" {answer}</s>", True))
    ]


def _dialogue_pieces(opening: str, turns: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    pieces = [(f"{SYSTEM} USER: {opening}{turns[0][0]} ASSISTANT:", False), (f" {turns[0][1]}</s>", True)]
    for question, answer in turns[1:]:
        pieces += [(f"USER: {question} ASSISTANT:", False), (f" {answer}</s>", True)]
    return pieces


def _shorthand(scene: Scene, rng: Random) -> str:
    """Type a scene patch by patch, a full stop where there is no digit; some strokes are missing."""
    letters, places = _LETTERS[scene.layout], patch_places(scene.layout)
    return "".join(
        " ." if at is None or rng.random() < 0.15 else f" {letters[at]}{scene.digits[at]}" for at in places
    )


def _train_tokenizer(rng: Random) -> PreTrainedTokenizerFast:
    """Train a small BPE shaped like Llama 2's: <unk> <s> </s>, a token a byte, `▁` for a blank.

    Digits and full stops stay single, so that a scene in shorthand has a token a patch.
    """
    blanks = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    single = pre_tokenizers.Split(Regex(r"▁[a-f][0-9]|▁?[0-9.]|[,?]"), "isolated")
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
            yield _shorthand(scene, rng)


def _pad(texts: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids, _ in texts)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in texts])  # (B, T)
    labels = torch.tensor([labels + [IGNORE] * (longest - len(labels)) for _, labels in texts])
    return ids, labels
