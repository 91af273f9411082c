"""A LLaVA's tokenizer -> that of its language model, without <image> and <pad>: what LLaVA and XTuner load.

tokenizer.json   less the tokens that were added    -> tokenizer.json, tokenizer_config.json, special_tokens_map.json
tokenizer.model  as it is                           -> tokenizer.model, where the folder has one
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rayllava import durable
from rayllava.checkpoint.layouts import StoredModel
from rayllava.checkpoint.layouts._tokenizer_json import for_old_readers
from rayllava.checkpoint.weights import read_config
from rayllava.recipe import ProcessorSpec

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def write_own_tokenizer(folder: Path, stored: StoredModel, spec: ProcessorSpec) -> dict[str, int]:
    """Write the files of the language model's tokenizer; return the ids of its bos, eos, unk and pad token."""
    source = stored.tokenizer_dir
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    listed = tokenizer["added_tokens"]
    added = {token["id"] for token in listed if _was_added(token, stored, spec)}
    tokenizer["added_tokens"] = [token for token in listed if token["id"] not in added]
    durable.write_text(
        folder / "tokenizer.json", json.dumps(for_old_readers(tokenizer), ensure_ascii=False, indent=1)
    )
    if (source / "tokenizer.model").is_file():
        shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    config = read_config(source, "tokenizer_config.json")
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]} | tokenizer["model"]["vocab"]
    roles = {role: text for role in _ROLES if (text := _text(config.get(role))) in ids}
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "add_bos_token": spec.bos_token_id is not None,
        "add_eos_token": False,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_max_length": spec.max_length,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in tokenizer["added_tokens"]
        },
    }
    durable.write_json(folder / "tokenizer_config.json", said)
    durable.write_json(folder / "special_tokens_map.json", roles)
    return {role: ids[text] for role, text in roles.items()}


def write_ends(folder: Path, stored: StoredModel, spec: ProcessorSpec, pad: int | None) -> None:
    """Write generation_config.json: where a text begins and what ends an answer, among the model's own tokens."""
    ends = [id_ for id_ in spec.stop_token_ids if id_ < stored.num_own_rows]
    said = {"bos_token_id": spec.bos_token_id, "eos_token_id": ends, "pad_token_id": pad}
    durable.write_json(folder / "generation_config.json", said)


def _was_added(token: dict[str, Any], stored: StoredModel, spec: ProcessorSpec) -> bool:
    """Whether a token came with pictures: behind the model's own rows, or in rows that were kept free for such."""
    new = token["id"] in (spec.image_token_id, spec.pad_token_id) and token["content"] in ("<image>", "<pad>")
    return token["id"] >= stored.num_own_rows or new


def _text(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token
