"""ProcessorSpec <-> the files from which plain transformers makes a LlavaProcessor.

ids      tokenizer.json, tokenizer_config.json      with `<image>` and the pad token at the spec's ids
pixels   preprocessor_config.json                   do_pad where the spec pads
counts   processor_config.json                      how many image tokens a picture takes
words    chat_template.json, chat_template.jinja    the spec's template
ends     generation_config.json                     the spec's stop tokens
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayllava import durable
from rayllava.checkpoint.layouts._chat_words import chat_template
from rayllava.checkpoint.layouts._tokenizer_json import for_old_readers
from rayllava.recipe import ProcessorSpec

if TYPE_CHECKING:
    from rayllava.checkpoint.layouts import StoredModel

log = logging.getLogger(__name__)

_BICUBIC = 3

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def write_prompt(folder: Path, stored: StoredModel, spec: ProcessorSpec) -> None:
    """Write everything but weights and config.json."""
    from transformers import AutoTokenizer

    image_token = _write_tokenizer(stored.tokenizer_dir, folder, spec)
    config = stored.config
    durable.write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": image_token,
            "patch_size": _side(config.vision_config.patch_size),
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "num_additional_image_tokens": int(_has_class_token(config)),
        },
    )
    durable.write_json(folder / "preprocessor_config.json", preprocessor(spec))
    durable.write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": spec.bos_token_id,
            "eos_token_id": list(spec.stop_token_ids),
            "pad_token_id": spec.pad_token_id,
        },
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos_token, gap = _bos_to_write(tokenizer, spec), _gap(tokenizer, image_token)
    words = chat_template(spec.template, bos_token=bos_token, gap=gap)
    if words is None:
        log.warning("%s has no chat template: jinja has no words for %s yet", folder.name, spec.template)
        return
    durable.write_text(folder / "chat_template.jinja", words)
    durable.write_json(folder / "chat_template.json", {"chat_template": words})


def describe(folder: Path, stored: StoredModel, *, template: str, aspect: str | None = None) -> ProcessorSpec:
    """Read a ProcessorSpec off a folder that has no manifest.json; the template is what no file says."""
    from transformers import AutoTokenizer

    config = stored.config
    pixels = _read_json(folder / "preprocessor_config.json") or {}
    pixels = (_read_json(folder / "processor_config.json") or {}).get("image_processor", pixels)
    if not pixels:
        raise ValueError(f"{folder} has no preprocessor_config.json; what its tower expects is unknown")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = (_read_json(folder / "generation_config.json") or {}).get("eos_token_id", tokenizer.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends]
    size = pixels.get("crop_size") or pixels["size"]
    size = size["height"] if isinstance(size, dict) else size
    num_patches = (size // _side(config.vision_config.patch_size)) ** 2
    dropped = config.vision_feature_select_strategy == "default"
    pad = next((i for i in (config.pad_token_id, tokenizer.pad_token_id) if i is not None), tokenizer.eos_token_id)
    return ProcessorSpec(
        template=template,
        aspect=aspect or ("pad" if pixels.get("do_pad") else "crop"),  # type: ignore[arg-type]
        max_length=config.text_config.max_position_embeddings,
        image_size=size,
        image_mean=pixels["image_mean"],
        image_std=pixels["image_std"],
        num_image_tokens=num_patches + _has_class_token(config) - dropped,
        image_token_id=config.image_token_id,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        stop_token_ids=tuple(dict.fromkeys([tokenizer.eos_token_id, *ends])),
    )


def own_rows(folder: Path, rows: int) -> int:
    """Return how many rows of a vocabulary with `rows` were there before a folder's converter added tokens.

    The converters of transformers and XTuner put <image> and <pad> behind all others, and XTuner an <unk> before
    them where there was none.
    """
    tokenizer = _read_json(folder / "tokenizer.json") or {}
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    new = [ids[text] for text in ("<image>", "<pad>") if text in ids]
    first, before = min(new, default=rows), len(tokenizer.get("model", {}).get("vocab", ()))
    if any(first <= id_ for id_ in ids.values() if id_ not in new):
        return rows
    return first - (ids.get("<unk>") == first - 1 >= before)


def preprocessor(spec: ProcessorSpec) -> dict[str, Any]:
    made = {
        "image_processor_type": "LlavaImageProcessor" if spec.aspect == "pad" else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": spec.image_size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": spec.image_size, "width": spec.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.image_mean),
        "image_std": list(spec.image_std),
    }
    return made | {"do_pad": True} if spec.aspect == "pad" else made


def _write_tokenizer(source: Path, folder: Path, spec: ProcessorSpec) -> str:
    """Write the tokenizer with the spec's special tokens and return the content of the image token."""
    if not (source / "tokenizer.json").is_file():
        raise ValueError(f"{source} holds no tokenizer.json; rayllava.prompt.assemble writes one")
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    added = _add_tokens(folder / "tokenizer.json", {spec.image_token_id: "<image>", spec.pad_token_id: "<pad>"})
    config = _read_json(folder / "tokenizer_config.json") or {}
    # What transformers 5 writes here, transformers 4 cannot read.
    if config.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for key in ("backend", "is_local", "local_files_only", "chat_template"):
        config.pop(key, None)
    config |= {"pad_token": added[spec.pad_token_id], "processor_class": "LlavaProcessor"}
    if "added_tokens_decoder" in config:
        for number, content in added.items():
            config["added_tokens_decoder"].setdefault(str(number), _added(content))
    durable.write_json(folder / "tokenizer_config.json", config)
    return added[spec.image_token_id]


def _add_tokens(path: Path, wanted: dict[int, str]) -> dict[int, str]:
    """Give each id that the tokenizer lacks its token and return the tokens of all ids."""
    from tokenizers import Tokenizer

    tokenizer = json.loads(path.read_text())
    found = Tokenizer.from_file(str(path))
    for number, content in sorted(wanted.items()):
        if found.id_to_token(number) is None:
            tokenizer["added_tokens"].append({"id": number} | _added(content))
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    durable.write_text(path, json.dumps(for_old_readers(tokenizer), ensure_ascii=False, indent=1))
    made = Tokenizer.from_file(str(path))
    contents = {number: made.id_to_token(number) or "" for number in wanted}
    for number, got in contents.items():
        if not got:
            raise ValueError(f"the tokenizer has no place for {wanted[number]} at id {number}")
    return contents


def _added(content: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, "special": True} | flags


def _bos_to_write(tokenizer: Any, spec: ProcessorSpec) -> str:
    """Return the begin token when the tokenizer does not put it there by itself."""
    if spec.bos_token_id is None:
        return ""
    adds = tokenizer("a")["input_ids"][0] == spec.bos_token_id
    return "" if adds else tokenizer.convert_ids_to_tokens(spec.bos_token_id)


def _has_class_token(config: Any) -> bool:
    return not config.vision_config.model_type.startswith("siglip")


def _side(size: int | list[int] | tuple[int, int]) -> int:
    return size if isinstance(size, int) else size[0]


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _gap(tokenizer: Any, image_token: str) -> str:
    """Return what makes plain transformers read the words after a picture as the beginning of a text.

    That is how LLaVA and XTuner trained, piece by piece. SentencePiece marks the beginning of a text by a space, and
    Llama's newer tokenizers only at the very front; then a space after the picture gives the same ids.
    """
    after = "\nWhat"
    alone = tokenizer(after, add_special_tokens=False)["input_ids"]
    for gap in ("", " "):
        if tokenizer(image_token + gap + after, add_special_tokens=False)["input_ids"][1:] == alone:
            return gap
    log.warning("no words make plain transformers read the text after a picture as it was trained")
    return ""
