"""Tokenizers small enough to train in a test, and processors that use them with any template."""

from __future__ import annotations

import json
import re
import tempfile
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from rayllava.prompt.chat import TEMPLATES
from rayllava.prompt.encode import Processor
from rayllava.recipe import ProcessorSpec

CONTROLS = (
    *("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<eoh>", "<eoa>", "<image>", "<pad>"),
)

WORDS = re.findall(
    r"\S+",
    "USER ASSISTANT A1 A2 Q1 Q2 system user assistant a cat sat on the mat while two dogs looked at it . , ? ! "
    "What is this picture about Describe what you see in the image there are many people and it rains today",
)

TEXTS = [
    *(template.default_system for template in TEMPLATES.values()),
    *(template.user for template in TEMPLATES.values()),
    "USER: What is this?\nASSISTANT: A cat sat on the mat while it rained.</s>",
    "USER: Why? ASSISTANT: Nobody knows.</s>",
    " ".join(WORDS),
]

KINDS = ("words", "bytes", "pieces", "legacy")
"""words: one token a word, unknown ones lost; bytes: like Llama 3's; pieces and legacy: like Llama 2's, with the
blank in front of a text once or after every control token."""

LOSSLESS = KINDS[1:]


_HELD = tempfile.TemporaryDirectory(prefix="rayllava-vocabularies-")


@lru_cache
def folder(kind: str) -> Path:
    """Return a folder with a tokenizer.json whose first ids are CONTROLS."""
    tokenizer = {"words": _words, "bytes": _bytes, "pieces": _pieces, "legacy": _legacy}[kind]()
    path = Path(_HELD.name) / kind
    path.mkdir()
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    return path


@lru_cache
def processor(kind: str, template: str, **changes: object) -> Processor:
    spec = ProcessorSpec(
        template=template,
        image_size=28,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        num_image_tokens=4,
        image_token_id=CONTROLS.index("<image>"),
        pad_token_id=CONTROLS.index("<pad>"),
        bos_token_id=CONTROLS.index("<s>"),
        eos_token_id=CONTROLS.index("</s>"),
        stop_token_ids=(CONTROLS.index("</s>"),),
        max_length=4096,
    )
    return Processor(spec.but(**changes), folder(kind))


def _controls() -> list[AddedToken]:
    return [AddedToken(text, normalized=False, special=True) for text in CONTROLS]


def _words() -> Tokenizer:
    pieces = Regex(r"\s|\w+|[^\w\s]")
    words = sorted({word for text in TEXTS for word in _split(text)} | {" ", "\n"})
    vocab = {word: id_ for id_, word in enumerate([*CONTROLS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(_controls())
    return tokenizer


def _split(text: str) -> list[str]:
    return re.findall(r"\s|\w+|[^\w\s]", text)


def _bytes() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=_controls(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _legacy() -> Tokenizer:
    """Llama 2 as transformers converted it: a normalizer puts the blank in front of every stretch of text."""
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    draft.train_from_iterator(TEXTS * 2, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(draft.to_str())["model"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = dict.fromkeys([*CONTROLS, *bytes_, "▁▁", *model["vocab"]])
    vocab = {text: id_ for id_, text in enumerate(pieces)}
    merges = [("▁", "▁"), *map(tuple, model["merges"])]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(_controls())
    return tokenizer


def _pieces() -> Tokenizer:
    """Llama 2 as Vicuna 1.5 configures it: the blank stands in front of the whole text alone."""
    content = json.loads(_legacy().to_str())
    content["normalizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer
