"""tokenizer.json in the words that old releases of `tokenizers` read too: LLaVA's own code pins one of 2024."""

from __future__ import annotations

from typing import Any


def for_old_readers(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Return what is to be written; the same tokenizer to new readers.

    Releases before 0.20 want a merge as one text, and whether Metaspace puts a blank in front in a word of its own.
    """
    model = dict(tokenizer["model"])
    merges = model.get("merges", [])
    if all(isinstance(merge, str) or not any(" " in piece for piece in merge) for merge in merges):
        model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return {key: _with_prefix(value) for key, value in tokenizer.items()} | {"model": model}


def _with_prefix(step: Any) -> Any:
    if isinstance(step, list):
        return [_with_prefix(one) for one in step]
    if not isinstance(step, dict):
        return step
    made = {key: _with_prefix(value) for key, value in step.items()}
    if made.get("type") == "Metaspace" and "prepend_scheme" in made:
        made.setdefault("add_prefix_space", made["prepend_scheme"] != "never")
    return made
