"""Tokenizers <-> what a GGUF file says of one.

SentencePiece     pieces with scores      tokenizer.ggml.model = llama    <-> tokenizer.model
bytes (GPT-2's)   tokens with merges      tokenizer.ggml.model = gpt2     <-> tokenizer.json

llama.cpp joins pieces by their scores. Where only tokenizer.json is there, the rank of the merge that makes a piece
stands for its score, which gives the same ids.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from rayllava import durable
from rayllava.checkpoint.gguffile import Kv, Said
from rayllava.checkpoint.layouts._chat_words import TEMPLATES
from rayllava.recipe import ProcessorSpec

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens, the same in GGUF and in SentencePiece's own files."""
_CONTROL_SCORE, _PAD_SCORE = -1000.0, -10000.0
"""What llama.cpp's own converter gives to control tokens and to rows without a token."""

OWN_ROWS = "rayllava.num_own_rows"
"""Our key for what no other says: rows of the vocabulary that the language model came with."""
SPACE_PREFIX = "rayllava.space_prefix"
"""Our key for which texts are read as if a blank stood before them: always, first (of a prompt alone), or never."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}
"""How words are cut before bytes are joined, and llama.cpp's name for it."""


def said_of(folder: Path, spec: ProcessorSpec, *, rows: int) -> dict[str, Kv]:
    """Return what a GGUF file with `rows` rows says of a folder's tokenizer; ValueError when it cannot say it."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ValueError(f"to=gguf holds BPE tokenizers, and that in {folder} is {model['type']}; use to=hf")
    byte_level = _pre(tokenizer) is not None
    if not byte_level and not model.get("byte_fallback"):
        raise ValueError(f"to=gguf: the tokenizer in {folder} is of neither kind that llama.cpp knows; use to=hf")
    texts, types = [f"[PAD{row}]" for row in range(rows)], [_UNUSED] * rows
    scores = [_PAD_SCORE] * rows
    for text, row in model["vocab"].items():
        texts[row], types[row], scores[row] = text, _NORMAL, 0.0
    if not byte_level:
        for row, (kind, score) in enumerate(_pieces(folder, model)):
            types[row], scores[row] = kind, score
    for token in tokenizer["added_tokens"]:
        row = token["id"]
        texts[row], types[row] = token["content"], _CONTROL if token["special"] else _USER
        scores[row] = _CONTROL_SCORE
    said = {
        "tokenizer.ggml.model": Kv("s", "gpt2" if byte_level else "llama"),
        "tokenizer.ggml.pre": Kv("s", _pre(tokenizer) or "default"),
        "tokenizer.ggml.tokens": Kv("[s", texts),
        "tokenizer.ggml.token_type": Kv("[i", types),
    }
    if byte_level:
        said["tokenizer.ggml.merges"] = Kv("[s", [" ".join(_pair(merge)) for merge in model["merges"]])
    else:
        said["tokenizer.ggml.scores"] = Kv("[f", scores)
        said[SPACE_PREFIX] = Kv("s", _scheme(tokenizer))
        said["tokenizer.ggml.add_space_prefix"] = Kv("?", _prefixes(_scheme(tokenizer), spec.template))
    ids = {"bos": spec.bos_token_id, "eos": spec.eos_token_id, "padding": spec.pad_token_id}
    ids["eot"] = next((id_ for id_ in spec.stop_token_ids if id_ != spec.eos_token_id), None)
    unknown = model.get("unk_token")
    ids["unknown"] = model["vocab"].get(unknown) if unknown else None
    said |= {f"tokenizer.ggml.{role}_token_id": Kv("I", id_) for role, id_ in ids.items() if id_ is not None}
    adds = {"bos": spec.bos_token_id is not None, "sep": False, "eos": False}
    return said | {f"tokenizer.ggml.add_{role}_token": Kv("?", value) for role, value in adds.items()}


def own_rows(said: Said) -> int:
    """Return how many rows a file's vocabulary had before tokens for pictures and padding were added."""
    texts, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    if not isinstance(texts, list) or not isinstance(types, list) or len(texts) != len(types):
        raise ValueError(f"{said.path} does not say a type of each of its tokens; give a whole model")
    if OWN_ROWS in said:
        return said.number(OWN_ROWS, most=len(texts))
    rows = len(texts)
    while rows and types[rows - 1] == _UNUSED and texts[rows - 1].startswith("[PAD"):
        rows -= 1
    if rows and any(text in ("<image>", "<pad>") for text in texts[:rows][-2:]):
        while rows and texts[rows - 1] in ("<image>", "<pad>"):
            rows -= 1
        return rows
    return len(texts)


def write_tokenizer(folder: Path, said: Said) -> None:
    """Write the files of the language model's own tokenizer into a folder."""
    kind = said.get("tokenizer.ggml.model")
    if kind not in ("llama", "gpt2") or "tokenizer.ggml.token_type" not in said:
        raise ValueError(f"{said.path} has a tokenizer of kind {kind}, which is not read; llama and gpt2 are")
    rows = own_rows(said)
    texts, types = said["tokenizer.ggml.tokens"][:rows], said["tokenizer.ggml.token_type"][:rows]
    roles = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        id_ = said.get(f"tokenizer.ggml.{key}_token_id")
        if id_ is not None and id_ < rows:
            roles[f"{role}_token"] = texts[id_]
    # llama.cpp lets Phi-3's control tokens swallow the blanks behind them, and knows it by its name.
    scheme = said.get(SPACE_PREFIX, "always" if said.get("tokenizer.ggml.add_space_prefix", True) else "never")
    strips = any(word in said.get("general.name", "").lower() for word in ("phi-3", "phi3"))
    flags = {"normalized": False, "special": True}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "legacy": scheme != "first",
        "add_bos_token": said.get("tokenizer.ggml.add_bos_token", kind == "llama"),
        "added_tokens_decoder": {
            str(row): {"content": text, "rstrip": strips and text.startswith("<|") and "endoftext" not in text}
            | flags
            | flags
            for row, (text, type_) in enumerate(zip(texts, types, strict=True))
            if type_ == _CONTROL or (type_ == _USER and strips)
        },
    }
    durable.write_json(folder / "tokenizer_config.json", config)
    if kind == "llama":
        scores = said.get("tokenizer.ggml.scores", [0.0] * rows)
        _write_sentencepiece(folder / "tokenizer.model", texts, types, scores, prefix=scheme != "never")
    else:
        _write_bytes(folder / "tokenizer.json", said, texts, types)


def _pieces(folder: Path, model: dict[str, Any]) -> list[tuple[int, float]]:
    """Return (type, score) of every piece of a SentencePiece vocabulary, by row."""
    if (folder / "tokenizer.model").is_file():
        proto = _proto()
        proto.ParseFromString((folder / "tokenizer.model").read_bytes())
        return [(piece.type, piece.score) for piece in proto.pieces]
    ranks = {"".join(_pair(merge)): rank for rank, merge in enumerate(model["merges"])}
    rows = sorted(model["vocab"].items(), key=lambda item: item[1])
    found = []
    for text, _ in rows:
        byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kind = _BYTE if byte else _UNKNOWN if text == model.get("unk_token") else _NORMAL
        found.append((kind, 0.0 if byte or text == model.get("unk_token") else -float(ranks.get(text, len(ranks)))))
    return found


def _write_sentencepiece(
    path: Path, texts: list[str], types: list[int], scores: list[float], *, prefix: bool
) -> None:
    proto = _proto()
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = trainer.BPE, len(texts), _BYTE in types
    rules.name, rules.add_dummy_prefix, rules.remove_extra_whitespaces = "identity", prefix, False
    for row, (text, type_, score) in enumerate(zip(texts, types, scores, strict=False)):
        # llama.cpp's converter says control of the unknown token too, which every such model has.
        kind = _UNKNOWN if text == "<unk>" else type_
        if kind == _UNKNOWN:
            trainer.unk_id, trainer.unk_piece = row, text
        proto.pieces.add(piece=text, score=score, type=kind)
    durable.write_bytes(path, proto.SerializeToString(deterministic=True))


def _write_bytes(path: Path, said: Said, texts: list[str], types: list[int]) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    # Files from before the key was there are Llama-3's if they have its control tokens.
    name = said.get("tokenizer.ggml.pre", "llama-bpe" if "<|start_header_id|>" in texts else "nobody")
    cuts = {known: pattern for pattern, known in _SPLITS.items()} | {"gpt-2": ""}
    if name not in cuts:
        raise ValueError(f"{said.path} cuts words as {name} does, which is not known here; {', '.join(cuts)} are")
    added = [row for row, kind in enumerate(types) if kind in (_CONTROL, _USER)]
    beside = set(added)
    vocab = {text: row for row, text in enumerate(texts) if row not in beside}
    merges = [tuple(merge.split(" ")) for merge in said["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *([pre_tokenizers.Split(Regex(cuts[name]), "isolated")] if cuts[name] else []),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cuts[name]),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for row in added:
        tokenizer.add_tokens([AddedToken(texts[row], normalized=False, special=types[row] == _CONTROL)])
        if tokenizer.token_to_id(texts[row]) != row:
            raise ValueError(f"{said.path} has ordinary tokens behind {texts[row]!a}, which is not read")
    bos = said.get("tokenizer.ggml.bos_token_id")
    if said.get("tokenizer.ggml.add_bos_token") and bos is not None:
        text = texts[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{text} $A", pair=f"{text} $A {text} $B", special_tokens=[(text, bos)]
        )
    durable.write_text(path, tokenizer.to_str(pretty=True))


def _proto() -> Any:
    pb2: Any = import_module("sentencepiece.sentencepiece_model_pb2")  # generated, without types
    return pb2.ModelProto()


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _pre(tokenizer: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for how a tokenizer of bytes cuts words; None when it is not one of bytes."""
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if not any(step["type"] == "ByteLevel" for step in steps):
        return None
    splits = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"]
    if not splits and any(step.get("use_regex") for step in steps):
        return "gpt-2"
    if len(splits) != 1 or splits[0] not in _SPLITS:
        raise ValueError(f"to=gguf: the tokenizer cuts words by {splits}, which llama.cpp has no name for; use to=hf")
    return _SPLITS[splits[0]]


def _scheme(tokenizer: dict[str, Any]) -> str:
    """Return which texts a tokenizer reads as if a blank stood before them."""
    front = [step["type"] for step in _steps(tokenizer.get("normalizer"), "normalizers")]
    if "Prepend" in front:
        return "always"
    meta = [step for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers") if step["type"] == "Metaspace"]
    return meta[0].get("prepend_scheme", "always") if meta else "never"


def _prefixes(scheme: str, template: str) -> bool:
    """Whether llama.cpp is to put a blank before every text between control tokens, or before none.

    It has no word for the front of a prompt alone; there, where a prompt begins with a control token, none is right.
    """
    words = TEMPLATES.get(template)
    return scheme == "always" or (scheme == "first" and not (words and words.user[0].startswith("<")))


def _steps(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return step[inner] if step["type"] == "Sequence" else [step]
