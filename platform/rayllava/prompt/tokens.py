"""Text <-> ids, through nothing but a folder's tokenizer.json.

    encode        text            -> ids, starts, stops of all tokens
    decode        ids             -> text without control tokens
    StreamDecoder id, id, id, ... -> text, text, text, ...   together: decode(ids)

A control token cannot be typed. The vocabulary is loaded with every control token spelled anew, so `</s>` in
somebody's words is four plain characters, tokenised with the words around it. Whoever means the token writes the
new spelling: `control(id)`, or `markup(text)` for a template's text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer as Backend

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""The tokens into which a character outside the vocabulary falls apart."""

_MARKUP = re.compile(r"<[^\s<>]+>")
"""Tokens of this look are control tokens even where the vocabulary does not call them special."""


class Tokens(NamedTuple):
    """The tokens of a text, in columns."""

    ids: np.ndarray  # int32 (T,)
    starts: np.ndarray  # int64 (T,)
    stops: np.ndarray  # int64 (T,)
    """Characters of the text that became a token; none for a blank that the tokenizer put in front."""


class Tokenizer:
    """A vocabulary whose control tokens only the program can write."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds no tokenizer.json; rayllava.prompt.assemble writes one")
        content = json.loads(path.read_text(encoding="utf-8"))
        self.controls = {t["id"]: t["content"] for t in content["added_tokens"] if _is_control(t)}
        """Text of every control token by its id."""
        # Drawn anew in each process, so that no text can hold it; ids do not depend on it.
        salt = secrets.token_hex(8)
        self._spelling = {id_: f"\uf8ff{salt}:{id_}\uf8ff" for id_ in self.controls}
        self._ids = {text: id_ for id_, text in self.controls.items()}
        literals = sorted(self._ids, key=len, reverse=True)
        self._literal = re.compile("|".join(map(re.escape, literals)) or r"(?!)")
        self._backend = Backend.from_str(json.dumps(_respelled(content, self.controls, self._spelling)))
        for id_, spelling in self._spelling.items():
            got = self._backend.token_to_id(spelling)
            assert got == id_, f"{path}: {self.controls[id_]} has id {got}, not the {id_} that the file says"

    def control(self, id_: int) -> str:
        """Return the spelling that encodes as this control token."""
        return self._spelling[id_]

    def markup(self, text: str) -> str:
        """Return text of our own, in which the names of control tokens mean the tokens."""
        return self._literal.sub(lambda found: self._spelling[self._ids[found[0]]], text)

    def encode(self, text: str) -> Tokens:
        """Return the tokens of a text, without a begin or end of sequence around them."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        starts, stops = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        return Tokens(np.array(encoding.ids, dtype=np.int32), starts, stops)

    def decode(self, ids: Iterable[int], *, controls: bool = False) -> str:
        """Return the text of the ids; control tokens are left out, or written by name."""
        if not controls:
            return self._backend.decode([i for i in ids if i not in self.controls], skip_special_tokens=False)
        text = self._backend.decode(list(ids), skip_special_tokens=False)
        for id_, spelling in self._spelling.items():
            text = text.replace(spelling, self.controls[id_])
        return text

    def has_text(self, id_: int) -> bool:
        """Say whether decoding keeps the id: no control token, nor a row of the model without a token."""
        return id_ not in self.controls and self._backend.id_to_token(id_) is not None

    def is_byte(self, id_: int) -> bool:
        """Say whether the token is a byte of a character outside the vocabulary."""
        return _BYTE.fullmatch(self._backend.id_to_token(id_) or "") is not None

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its text, None when the vocabulary lacks it."""
        return self._ids[token] if token in self._ids else self._backend.token_to_id(token)


class StreamDecoder:
    """Decodes an answer while it is made. A piece of text, once returned, never changes.

    A piece is held back while the character it ends with may still be incomplete. What is left comes with `close`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # The text of the last piece returned is decoded again with each new one: what a token looks like depends
        # on its neighbour on the left, as with the blank that is dropped at the front of an answer.
        self._shown = 0

    def push(self, id_: int) -> str:
        """Return the text that this id completes, often empty."""
        if not self._tokenizer.has_text(id_):
            return ""
        self._ids.append(id_)
        # A run of byte tokens is valid or not as a whole, so it is only known when it ends.
        if self._tokenizer.is_byte(id_):
            return ""
        return self._piece(final=False)

    def close(self) -> str:
        """Return the text that was held back; an incomplete character becomes U+FFFD."""
        return self._piece(final=True)

    def _piece(self, *, final: bool) -> str:
        text = self._tokenizer.decode(self._ids)
        if not final and text.endswith("\ufffd"):
            return ""
        piece = text[len(self._tokenizer.decode(self._ids[: self._shown])) :]
        if piece:  # a token that shows nothing is no neighbour to decode the next one behind
            self._ids = self._ids[self._shown :]
            self._shown = len(self._ids)
        return piece


def _is_control(token: dict[str, Any]) -> bool:
    if _BYTE.fullmatch(token["content"]):
        return False
    return token["special"] or _MARKUP.fullmatch(token["content"]) is not None


def _respelled(content: dict[str, Any], controls: dict[int, str], spelling: dict[int, str]) -> dict[str, Any]:
    """Return the tokenizer with its control tokens spelled anew, wherever their text occurs."""
    new = {text: spelling[id_] for id_, text in controls.items()}
    model = dict(content["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {new.get(text, text): id_ for text, id_ in vocab.items()}
    else:  # Unigram: a list of (text, score)
        model["vocab"] = [[new.get(text, text), score] for text, score in vocab]
    if model.get("unk_token") in new:
        model["unk_token"] = new[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [m for m in map(_pair, model["merges"]) if not {m[0], m[1], "".join(m)} & new.keys()]
    known = model["vocab"] if isinstance(vocab, dict) else {text for text, _ in vocab}
    added = [
        {**token, "content": new.get(token["content"], token["content"])}
        for token in content["added_tokens"]
        # Byte tokens that a vocabulary has in its model are found by falling back, not by being typed.
        if not (_BYTE.fullmatch(token["content"]) and token["content"] in known)
    ]
    return {
        **content,
        "model": {**model, "dropout": None} if "dropout" in model else model,
        "added_tokens": added,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge
