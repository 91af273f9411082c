"""Language model + tower + prompt -> ProcessorSpec, and the tokenizer that goes with it.

tokenizer.json                      is taken as it is: it is what the model was trained with
tokenizer.model (SentencePiece)     is converted here, without any code of the model's repository
    + <image>, and <pad> where the model has no pad token of its own
    -> OUT/tokenizer.json, tokenizer_config.json, special_tokens_map.json, tokenizer.model where there is one
"""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rayllava import durable
from rayllava.families import FAMILIES
from rayllava.prompt.chat import template_of
from rayllava.recipe import ModelSpec, ProcessorSpec, PromptSpec
from rayllava.records import IMAGE_MARK

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def assemble(
    *, llm_dir: Path, vision_dir: Path, model: ModelSpec, prompt: PromptSpec, out_dir: Path
) -> ProcessorSpec:
    """Write the model's tokenizer into `out_dir` and return how dialogues and pictures become its input."""
    template, family = template_of(prompt.template), FAMILIES[model.family]
    picture = _read_picture(vision_dir, model)
    if prompt.max_length <= picture.num_tokens:
        raise ValueError(
            f"prompt.max_length={prompt.max_length} leaves no room for {picture.num_tokens} image tokens; "
            f"use at least {picture.num_tokens + 64}"
        )
    config = _read_json(llm_dir / "tokenizer_config.json")
    roles = _roles(llm_dir, config)
    tokenizer = _load(llm_dir, config, roles)
    if "eos_token" not in roles or not _knows(tokenizer, roles["eos_token"]):
        raise ValueError(f"{llm_dir} names no eos_token of its vocabulary in tokenizer_config.json")
    if roles.get("pad_token") in (None, *(roles.get(role) for role in _ROLES[:3])):
        roles["pad_token"] = "<pad>"
    known = [text for text in roles.values() if _knows(tokenizer, text)]
    _add_controls(tokenizer, [IMAGE_MARK, roles["pad_token"], *known])
    _save(tokenizer, roles, config, out_dir)
    if (llm_dir / "tokenizer.model").is_file():  # what a conversion back gives, and what llama.cpp takes scores from
        shutil.copyfile(llm_dir / "tokenizer.model", out_dir / "tokenizer.model")
    ids = {role: tokenizer.token_to_id(text) for role, text in roles.items()}
    stops = [ids["eos_token"], *map(tokenizer.token_to_id, (*family.stop_tokens, template.stop.strip()))]
    return ProcessorSpec(
        **prompt.model_dump(),
        image_size=picture.size,
        image_mean=picture.mean,
        image_std=picture.std,
        num_image_tokens=picture.num_tokens,
        image_token_id=tokenizer.token_to_id(IMAGE_MARK),
        pad_token_id=ids["pad_token"],
        # A tokenizer may know a BOS and say that none is put in front (Yi, Qwen).
        bos_token_id=ids.get("bos_token") if config.get("add_bos_token") is not False else None,
        eos_token_id=ids["eos_token"],
        stop_token_ids=tuple(dict.fromkeys(id_ for id_ in stops if id_ is not None)),
    )


class _Picture(NamedTuple):
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_tokens: int


def _read_picture(folder: Path, model: ModelSpec) -> _Picture:
    """Return what a tower is to see: the recipe's size goes before its preprocessor's, and that before its own."""
    processor = _read_json(folder / "preprocessor_config.json")
    config = _read_json(folder / "config.json")
    config = config.get("vision_config", config)
    missing = [name for name in ("image_mean", "image_std") if name not in processor]
    if missing or "patch_size" not in config:
        where = "preprocessor_config.json" if missing else "config.json"
        raise ValueError(f"{folder / where} says no {(*missing, 'patch_size')[0]}; give a complete vision tower")
    size = model.image_size or _side(processor.get("crop_size")) or _side(processor.get("size"))
    size = size or _side(config.get("image_size"))
    patch = _side(config["patch_size"])
    if size is None or patch is None:
        raise ValueError(f"{folder} says neither crop_size, size nor image_size; give a complete vision tower")
    if model.image_size and size % patch:
        raise ValueError(f"model.image_size={size} cuts patches of {patch} pixels; use {size - size % patch + patch}")
    has_class = not config.get("model_type", "").startswith("siglip")
    if not has_class and model.vision_feature_select == "default":
        raise ValueError(
            f"model.vision_feature_select=default drops the class token, which the tower in {folder} lacks; use full"
        )
    num_tokens = (size // patch) ** 2 + (has_class and model.vision_feature_select == "full")
    return _Picture(size, tuple(processor["image_mean"]), tuple(processor["image_std"]), num_tokens)


def _side(value: Any) -> int | None:
    """Return one number of 336, [336, 336], {"height": 336, ...} or {"shortest_edge": 336}."""
    if isinstance(value, dict):
        value = value.get("shortest_edge") or value.get("height")
    return value[0] if isinstance(value, list) else value


def _roles(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the texts of bos_token, eos_token, unk_token and pad_token, as far as they are named."""
    named = {**_read_json(folder / "special_tokens_map.json"), **{k: v for k, v in config.items() if v}}
    texts = {role: named.get(role) for role in _ROLES}
    return {role: t["content"] if isinstance(t, dict) else t for role, t in texts.items() if t}


def _load(folder: Path, config: dict[str, Any], roles: dict[str, str]) -> Tokenizer:
    """Return the folder's tokenizer.

    Not through AutoTokenizer: its Llama class rebuilds the normalizer from defaults, and so changes the ids of a
    tokenizer.json that was written with other ones.
    """
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        _add_promised(tokenizer, [t for t in _promised(folder, config) if not _knows(tokenizer, t.content)], folder)
        return tokenizer
    if (folder / "tokenizer.model").is_file():
        return _convert(folder, config, roles)
    raise ValueError(f"{folder} holds neither tokenizer.json nor tokenizer.model; give a complete language model")


def _convert(folder: Path, config: dict[str, Any], roles: dict[str, str]) -> Tokenizer:
    """Return a SentencePiece model as a `tokenizers` one that gives the same ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import generate_merges

    pb2: Any = import_module("sentencepiece.sentencepiece_model_pb2")  # generated, without types
    proto = pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    kind, rules = proto.trainer_spec.model_type, proto.normalizer_spec
    if kind != proto.trainer_spec.BPE or rules.precompiled_charsmap or rules.remove_extra_whitespaces:
        raise ValueError(
            f"{folder / 'tokenizer.model'} is not a plain BPE as Llama's; convert it to tokenizer.json with the "
            "model's own tools"
        )
    piece = pb2.ModelProto.SentencePiece
    texts = [p.piece for p in proto.pieces]
    plain = [p.type == piece.NORMAL for p in proto.pieces]
    promised = _promised(folder, config)
    for token in promised:  # a chat model may give a reserved piece another name
        if token.id < len(texts):
            texts[token.id], plain[token.id] = token.content, False
    vocab = {text: id_ for id_, text in enumerate(texts)}
    scores = {t: p.score for t, p, is_plain in zip(texts, proto.pieces, plain, strict=True) if is_plain}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=generate_merges(vocab, scores),
            unk_token=texts[proto.trainer_spec.unk_id],
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    # Llama's two ways with the blank in front of a text: before everything between two control tokens
    # ("legacy", and the only one of InternLM's own tokenizers), or before the first of them alone.
    prefix = rules.add_dummy_prefix and config.get("add_prefix_space") is not False
    if config.get("legacy", True) is False:
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    else:
        front = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "▁")])
    back = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *back]
    )
    for text, p in zip(texts, proto.pieces, strict=True):
        if p.type in (piece.UNKNOWN, piece.CONTROL, piece.USER_DEFINED):
            special = p.type != piece.USER_DEFINED
            tokenizer.add_tokens([AddedToken(text, normalized=False, special=special)])
    _add_promised(tokenizer, promised, folder)
    bos = roles.get("bos_token")
    if bos and _knows(tokenizer, bos) and config.get("add_bos_token") is not False:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


class _Promised(NamedTuple):
    """A token that a folder's files put beside the vocabulary, with the id they give it."""

    id: int
    content: str
    flags: dict[str, bool]


def _promised(folder: Path, config: dict[str, Any]) -> list[_Promised]:
    listed = {
        int(id_): token if isinstance(token, dict) else {"content": token}
        for id_, token in config.get("added_tokens_decoder", {}).items()
    }
    for content, id_ in _read_json(folder / "added_tokens.json").items():
        listed.setdefault(id_, {"content": content})
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    default = {"normalized": False, "special": True}
    return [
        _Promised(id_, t["content"], default | {name: t[name] for name in flags if name in t})
        for id_, t in sorted(listed.items())
    ]


def _add_promised(tokenizer: Tokenizer, promised: list[_Promised], folder: Path) -> None:
    from tokenizers import AddedToken

    for token in promised:
        tokenizer.add_tokens([AddedToken(token.content, **token.flags)])
        got = tokenizer.token_to_id(token.content)
        if got != token.id:
            raise ValueError(f"{folder} gives {token.content} the id {token.id}, its vocabulary leads to {got}")


def _add_controls(tokenizer: Tokenizer, texts: list[str]) -> None:
    from tokenizers import AddedToken

    controls = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    new = [AddedToken(text, normalized=False, special=True) for text in texts if text not in controls]
    tokenizer.add_special_tokens(new)


def _knows(tokenizer: Tokenizer, text: str) -> bool:
    return tokenizer.token_to_id(text) is not None


def _save(tokenizer: Tokenizer, roles: dict[str, str], config: dict[str, Any], out_dir: Path) -> None:
    """Write the tokenizer so that transformers' AutoTokenizer reads it as it is."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    durable.write_text(out_dir / "tokenizer.json", tokenizer.to_str(pretty=True))
    # The class name is the one that every version of transformers takes for "what tokenizer.json says".
    # The model's own chat template stays behind: it is not what this model is asked with.
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "additional_special_tokens": [IMAGE_MARK],
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.get("model_max_length", 1_000_000),
    }
    durable.write_json(out_dir / "tokenizer_config.json", said)
    durable.write_json(out_dir / "special_tokens_map.json", {**roles, "additional_special_tokens": [IMAGE_MARK]})


def _read_json(path: Path) -> dict[str, Any]:
    """Return a file's object; an absent one is empty."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
