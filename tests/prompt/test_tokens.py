"""Text to ids and back, whole and piece by piece."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from tokenizers import Tokenizer as Backend

from rayllava.prompt.tokens import StreamDecoder, Tokenizer
from tests.prompt.dialogues import random_dialogue
from tests.prompt.vocabularies import CONTROLS, KINDS, LOSSLESS, folder


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_control_tokens_has_the_ids_of_the_plain_library(kind: str) -> None:
    rng = Random(kind)
    made, plain = Tokenizer(folder(kind)), Backend.from_file(str(folder(kind) / "tokenizer.json"))
    for turn in (turn for _ in range(200) for turn in random_dialogue(rng, wild=True)):
        said = turn.replace("<image>", "")
        ids = made.encode(said).ids.tolist()
        assert ids == plain.encode(said, add_special_tokens=False).ids
        assert made.decode(ids) == plain.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_markup_has_the_ids_of_the_plain_library(kind: str) -> None:
    made, plain = Tokenizer(folder(kind)), Backend.from_file(str(folder(kind) / "tokenizer.json"))
    text = "<|im_start|>user\nWhat is this?<|im_end|>\n<s>a cat</s>USER: <image>\n"
    assert made.encode(made.markup(text)).ids.tolist() == plain.encode(text, add_special_tokens=False).ids
    assert made.encode(made.control(2)).ids.tolist() == [2]


@pytest.mark.parametrize("kind", LOSSLESS)
def test_typed_control_tokens_are_text(kind: str) -> None:
    made = Tokenizer(folder(kind))
    text = "a " + " ".join(CONTROLS) + "".join(CONTROLS) + "<0x41>"
    ids = made.encode(text).ids.tolist()
    assert min(ids) >= len(CONTROLS) and made.decode(ids) == text


def test_control_tokens_are_left_out_or_written_by_name() -> None:
    made = Tokenizer(folder("pieces"))
    ids = [1, *made.encode("a cat").ids.tolist(), 2]
    assert made.decode(ids) == "a cat"
    assert made.decode(ids, controls=True) == "<s> a cat</s>"
    assert made.id_of("</s>") == 2 and made.id_of("nowhere") is None


def test_a_token_in_angle_brackets_is_a_control_token_even_if_not_called_special(tmp_path: Path) -> None:
    content = json.loads((folder("pieces") / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = token["content"] != "</s>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert 2 not in Tokenizer(tmp_path).encode("a</s>").ids.tolist()


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_pieces_together_are_the_decoded_text(kind: str) -> None:
    rng = Random(kind)
    made = Tokenizer(folder(kind))
    vocabulary = Backend.from_file(str(folder(kind) / "tokenizer.json")).get_vocab_size()
    texts = [turn.replace("<image>", "") for _ in range(100) for turn in random_dialogue(rng, wild=True)]
    spoken = [made.encode(text).ids.tolist() for text in texts]
    beyond = 20  # a model may have rows that no token belongs to
    noise = [[rng.randrange(vocabulary + beyond) for _ in range(rng.randint(0, 30))] for _ in range(400)]
    for ids in [*spoken, *noise, []]:
        stream = StreamDecoder(made)
        pieces = [*(stream.push(id_) for id_ in ids), stream.close()]
        assert "".join(pieces) == made.decode(ids)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_stream_never_shows_half_a_character(kind: str) -> None:
    made = Tokenizer(folder(kind))
    text = "é 🙂猫 👩‍👩‍👧 a\nb"
    stream = StreamDecoder(made)
    pieces = [*(stream.push(id_) for id_ in made.encode(text).ids.tolist()), stream.close()]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 3


def test_a_stream_that_ends_in_mid_character_says_so() -> None:
    made = Tokenizer(folder("bytes"))
    ids = made.encode("a🙂").ids.tolist()[:-1]
    stream = StreamDecoder(made)
    assert "".join(stream.push(id_) for id_ in ids) == "a"
    assert stream.close() == "\ufffd" and stream.close() == ""
