"""What a line on the terminal does to a dialogue."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import chat as job
from rayllava.generate.terminal import Chat
from rayllava.records import Turn

PICTURE = Path(__file__).parents[1] / "assets" / "gguf_llava" / "image_square.png"


class Echo:
    """Answers by numbers, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[Turn, ...], tuple[bytes, ...]]] = []

    def __call__(self, turns: tuple[Turn, ...], images: tuple[bytes, ...]) -> Iterator[str]:
        self.asked.append((turns, images))
        return iter((f"answer {len(self.asked)}", "."))


def said(chat: Chat, *lines: str) -> str:
    return "".join(piece for line in lines for piece in chat.take(line))


def test_pictures_go_to_the_next_question_and_stay_in_the_dialogue() -> None:
    chat = Chat(echo := Echo())
    url = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
    out = said(chat, f"/image {PICTURE}", f"/image {url}", "What are these?", "", "Sure?")
    assert out == "1 for the next question\n2 for the next question\nanswer 1.\nanswer 2.\n"
    turns, images = echo.asked[1]
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    assert turns[0].text == "<image>\n<image>\nWhat are these?" and turns[2].text == "Sure?"
    assert images == (PICTURE.read_bytes(),) * 2


def test_a_mark_in_somebodys_words_is_no_picture() -> None:
    chat = Chat(echo := Echo())
    said(chat, "What is <image>?")
    assert echo.asked[0][0][0].text == "What is ?"


def test_regen_asks_the_same_again() -> None:
    chat = Chat(echo := Echo())
    said(chat, "What?", "/regen")
    assert echo.asked[0] == echo.asked[1]
    assert [turn.text for turn in chat.turns] == ["What?", "answer 2."]
    with pytest.raises(ValueError, match="no answer to give again"):
        said(Chat(Echo()), "/regen")


def test_reset_forgets_and_system_begins_anew() -> None:
    chat = Chat(echo := Echo(), system="Be brief.")
    said(chat, f"/image {PICTURE}", "What?", "/reset", "Who?")
    assert echo.asked[1] == ((Turn("system", "Be brief."), Turn("user", "Who?")), ())
    said(chat, "/system Be long.", "Why?", "/system", "When?")
    assert echo.asked[2][0][0].text == "Be long." and echo.asked[3][0] == (Turn("user", "When?"),)


def test_a_dialogue_is_saved_with_its_pictures(tmp_path: Path) -> None:
    chat = Chat(Echo())
    said(chat, f"/image {PICTURE}", "What?", f"/save {tmp_path / 'talk.json'}")
    kept = json.loads((tmp_path / "talk.json").read_text())
    assert kept["turns"][1] == {"role": "assistant", "content": "answer 1."}
    assert base64.b64decode(kept["images"][0]) == PICTURE.read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/fly", "/fly is no command; /help lists them"),
        ("/image nowhere.png", "image=nowhere.png cannot be read"),
        (f"/image {__file__}", "the image is none of JPEG"),
        ("/image https://example.org/cat.jpg", "remote images from this host are off"),
        ("/save", "/save wants a file"),
    ],
)
def test_what_cannot_be_is_said_and_the_dialogue_goes_on(line: str, message: str) -> None:
    chat = Chat(Echo())
    with pytest.raises(ValueError, match=message):
        said(chat, line)
    assert said(chat, "What?") == "answer 1.\n"


def test_a_question_that_fails_leaves_the_dialogue_as_it_was() -> None:
    def fail(turns: tuple[Turn, ...], _: tuple[bytes, ...]) -> Iterator[str]:
        yield "I"
        if turns[-1].text.endswith("Boom?"):
            raise ValueError("the prompt takes 9000 positions")

    chat = Chat(fail)
    said(chat, "What?")
    before = chat.turns, chat.pictures
    for line in ("Boom?", "Boom?"):
        with pytest.raises(ValueError, match="9000 positions"):
            said(chat, f"/image {PICTURE}", line)
        assert (chat.turns, chat.pictures) == before
    assert said(chat, "Why?") == "I\n" and chat.turns[2].text == "<image>\n<image>\nWhy?"


def test_help_and_quit() -> None:
    chat = Chat(Echo())
    assert "/regen" in said(chat, "/help") and not chat.over
    assert said(chat, "/quit") == "" and chat.over


@pytest.mark.parametrize(
    ("words", "model", "fields"),
    [
        (["runs/mine", "quant=nf4"], "runs/mine", ["quant=nf4"]),
        (
            ["internlm2", "--visual-encoder", "clip", "--llava", "mine", "--prompt-template", "internlm2_chat"],
            "mine",
            ["base=internlm2", "vision_tower=clip", "template=internlm2_chat"],
        ),
        (
            ["--model-path", "lora", "--model-base", "vicuna", "--conv-mode", "vicuna_v1", "--load-4bit"],
            "lora",
            ["base=vicuna", "template=vicuna_v1", "quant=nf4"],
        ),
        (
            ["mine", "--llava", "mine", "--visual-encoder", "mine/visual_encoder", "--prompt-template", "phi3_chat"],
            "mine",
            ["template=phi3_chat"],
        ),
        (["--llava", "mine", "vision_tower=s3://models/clip"], "mine", ["vision_tower=s3://models/clip"]),
        (["--model-path", "mine", "--bits", "8", "threads=1"], "mine", ["quant=int8", "threads=1"]),
    ],
)
def test_flags_of_the_upstream_programs_are_understood(words: list[str], model: str, fields: list[str]) -> None:
    got = job._words(words)
    assert (got.model, got.fields) == (model, fields)
