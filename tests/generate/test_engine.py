"""The engine answers as `model.generate` does, whoever else is being answered."""

from __future__ import annotations

import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rayllava.checkpoint.layouts import StoredModel, write
from rayllava.checkpoint.manifest import ModelManifest
from rayllava.generate import engine as engine_
from rayllava.generate.answer import Answer
from rayllava.generate.engine import Engine
from rayllava.generate.load import load_engine
from rayllava.model.normalise import normalise
from rayllava.prompt.encode import Processor
from rayllava.records import Delta, Request, Sample, Turn
from tests.generate.llava import tiny_llava
from tests.tiny import make_parts, processor_spec

TOKENS: dict[str, list[int]] = {}
"""Tokens of every answer by request id."""


class Recorded(Answer):
    def take(self, token: int) -> Delta:
        TOKENS.setdefault(self.id, []).append(token)
        return super().take(token)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "export"
    tokenizer_dir = Path(make_parts(folder.parent / "parts").llm)
    manifest = ModelManifest(processor=processor_spec(max_length=512), family="vicuna", source="test")
    write("hf", folder, StoredModel.of(tiny_llava(), tokenizer_dir, num_own_rows=330), manifest)
    return folder


@pytest.fixture
def engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    TOKENS.clear()
    monkeypatch.setattr(engine_, "Answer", Recorded)
    return load_engine(folder, max_batch=4)


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (30 + seed, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def ask(id: str, text: str = "what is shown", *images: int, **more: Any) -> Request:
    marks = "<image>\n" * len(images)
    more = {"max_new_tokens": 12} | more
    return Request(id, (Turn("user", marks + text),), tuple(map(picture, images)), **more)


MIXED = [
    ask("words"),
    ask("picture", "what is shown in this picture", 1),
    ask("long", "how many digits are there in this picture " * 5, 2, max_new_tokens=5),
    ask("two", "one two three", 3, 1, max_new_tokens=20),
    ask("same picture", "a number", 1, max_new_tokens=9),
    ask("short", "a", max_new_tokens=1),
]


def expected(engine: Engine, request: Request) -> list[int]:
    """Return the tokens of `model.generate` on the request alone."""
    spec = engine.processor.spec
    example = engine.processor.encode(Sample("", request.turns, request.images), open_turn=True)
    pixels = normalise(torch.from_numpy(example.pixels), spec, dtype=torch.float32)
    ids = torch.from_numpy(example.ids).long().unsqueeze(0)
    made = engine.model.generate(
        input_ids=ids,
        **({"pixel_values": pixels} if len(pixels) else {}),
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=request.max_new_tokens,
        eos_token_id=list(spec.stop_token_ids),
        pad_token_id=spec.pad_token_id,
    )
    return made[0, ids.shape[1] :].tolist()


def texts(deltas: list[Delta]) -> dict[str, str]:
    found: dict[str, str] = defaultdict(str)
    for delta in deltas:
        found[delta.id] += delta.text
    return dict(found)


def test_greedy_answers_are_those_of_generate_token_for_token(engine: Engine) -> None:
    deltas = list(engine.generate(MIXED))
    for request in MIXED:
        assert TOKENS[request.id] == expected(engine, request), request.id
    assert not engine.has_work and engine._rows is None
    ends = {delta.id: delta.finish for delta in deltas if delta.finish}
    assert ends.keys() == {request.id for request in MIXED}
    assert len([delta for delta in deltas if delta.finish]) == len(MIXED)


def test_rows_of_a_windowed_model_join_and_leave(engine: Engine) -> None:
    windowed = Engine(tiny_llava(kind="phi3"), engine.processor, max_batch=2)
    list(windowed.generate(MIXED))
    for request in MIXED:
        assert TOKENS[request.id] == expected(windowed, request), request.id


def test_a_batch_changes_no_answer(engine: Engine, folder: Path) -> None:
    together = texts(list(engine.generate(MIXED)))
    alone = load_engine(folder, max_batch=1)
    assert together == texts(list(alone.generate(MIXED)))


def test_texts_together_are_the_decoded_tokens(engine: Engine) -> None:
    found = texts(list(engine.generate(MIXED)))
    for request in MIXED:
        assert found[request.id] == engine.processor.decode(TOKENS[request.id]).removeprefix(" ")


def test_a_late_request_joins_between_steps(engine: Engine) -> None:
    engine.submit(MIXED[3])
    for _ in range(6):
        engine.step()
    engine.submit(MIXED[1])
    first = engine.step()
    assert {delta.id: delta.num_tokens for delta in first} == {"two": 7, "picture": 1}
    while engine.has_work:
        engine.step()
    for request in (MIXED[3], MIXED[1]):
        assert TOKENS[request.id] == expected(engine, request)


def test_more_requests_than_rows_wait_their_turn(engine: Engine) -> None:
    for number in range(6):
        engine.submit(ask(str(number), max_new_tokens=3))
    assert {delta.id for delta in engine.step()} == {"0", "1", "2", "3"}
    assert engine.num_open == 6
    while engine.has_work:
        engine.step()
    assert sorted(TOKENS) == ["0", "1", "2", "3", "4", "5"]


def test_generate_draws_requests_only_as_there_is_room(engine: Engine) -> None:
    drawn = []

    def requests():  # type: ignore[no-untyped-def]
        for number in range(20):
            drawn.append(number)
            yield ask(str(number), max_new_tokens=4)

    answers = engine.generate(requests())
    next(answers)
    assert len(drawn) == 4
    answers.close()
    assert not engine.has_work


def test_cancelling_frees_the_row_at_once_and_disturbs_nobody(engine: Engine) -> None:
    for request in MIXED[:3]:
        engine.submit(request)
    engine.submit(ask("waiting"))
    engine.step()
    engine.submit(ask("late"))
    engine.cancel("picture")
    engine.cancel("late")
    engine.cancel("never heard of")
    assert engine._rows is not None and len(engine._rows.mask) == 3
    ends = {delta.id: delta.finish for delta in engine.step() if delta.finish}
    assert ends["picture"] == ends["late"] == "abort"
    while engine.has_work:
        engine.step()
    assert TOKENS["words"] == expected(engine, MIXED[0]) and TOKENS["long"] == expected(engine, MIXED[2])


def test_a_seed_gives_the_same_answer_among_other_neighbours(engine: Engine, folder: Path) -> None:
    drawn = ask("drawn", "what is shown", 1, temperature=1.0, top_p=0.9, seed=7, max_new_tokens=16)
    alone = texts(list(engine.generate([drawn])))["drawn"]
    others = [ask(str(n), "a digit", n, temperature=2.0, seed=n) for n in range(3)]
    assert texts(list(engine.generate([*others, drawn])))["drawn"] == alone
    other_seed = ask("drawn", "what is shown", 1, temperature=1.0, top_p=0.9, seed=8, max_new_tokens=16)
    assert texts(list(engine.generate([other_seed])))["drawn"] != alone


def test_a_tiny_nucleus_is_greedy(engine: Engine) -> None:
    list(engine.generate([ask("drawn", temperature=5.0, top_p=1e-9, seed=1)]))
    assert TOKENS["drawn"] == expected(engine, ask("words"))


def test_a_stop_string_ends_the_answer_before_it(engine: Engine) -> None:
    request = ask("free", "what is shown", 1, max_new_tokens=30)
    whole = texts(list(engine.generate([request])))["free"]
    stop = whole[len(whole) // 2 :][:4]
    deltas = list(engine.generate([ask("cut", "what is shown", 1, max_new_tokens=30, stop=("never", stop))]))
    assert texts(deltas)["cut"] == whole[: whole.index(stop)]
    assert deltas[-1].finish == "stop" and deltas[-1].num_tokens < 30


def test_a_stop_token_is_counted_and_not_shown(engine: Engine, folder: Path) -> None:
    list(engine.generate([ask("free")]))
    token = TOKENS["free"][3]
    spec = engine.processor.spec.but(stop_token_ids=(token,))
    stopping = Engine(engine.model, Processor(spec, folder))
    deltas = list(stopping.generate([ask("cut")]))
    first = TOKENS["free"].index(token)
    assert deltas[-1].finish == "stop" and deltas[-1].num_tokens == first + 1
    assert texts(deltas)["cut"] == engine.processor.decode(TOKENS["free"][:first]).removeprefix(" ")


def test_the_context_ends_an_answer(engine: Engine) -> None:
    engine.context = 200
    deltas = list(engine.generate([ask("long", max_new_tokens=1000)]))
    assert deltas[-1].finish == "length"
    assert deltas[-1].num_prompt_tokens + deltas[-1].num_tokens == 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"stop": ("",)}, "empty string"),
    ],
)
def test_bad_knobs_are_named(engine: Engine, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.submit(ask("bad", **changes))
    assert not engine.has_work


def test_what_cannot_be_asked_is_refused_at_the_door(engine: Engine) -> None:
    with pytest.raises(ValueError, match="not an image"):
        engine.submit(Request("bad", (Turn("user", "<image>\nhi"),), (b"no picture",)))
    engine.context = 10
    with pytest.raises(ValueError, match="positions of the model's 10"):
        engine.submit(ask("long"))
    engine.context = 512
    engine.submit(ask("twice"))
    with pytest.raises(ValueError, match="request twice is being answered already"):
        engine.submit(ask("twice"))


def test_equal_pictures_are_encoded_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    encode = engine.model.get_image_features

    def counted(**inputs: Any) -> Any:
        batches.append(len(inputs["pixel_values"]))
        return encode(**inputs)

    monkeypatch.setattr(engine.model, "get_image_features", counted)
    requests = [ask(str(n), "what is shown", 1) for n in range(3)] + [ask("other", "a digit", 2)]
    list(engine.generate(requests))
    assert batches == [2]


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_quantised_model_answers(folder: Path, quant: str) -> None:
    engine = load_engine(folder, quant=quant)
    assert {delta.id for delta in engine.generate(MIXED)} == {request.id for request in MIXED}


def test_half_precision_answers_on_the_cpu_too(folder: Path) -> None:
    engine = load_engine(folder, quant="nf4", dtype="bfloat16", threads=1)
    assert engine.model.dtype == torch.bfloat16
    assert list(engine.generate([ask("words", max_new_tokens=2)]))[-1].finish == "length"


def test_what_is_no_model_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quant=int3 is none of"):
        load_engine(folder, quant="int3")
    with pytest.raises(ValueError, match="dtype=float8 is none of"):
        load_engine(folder, dtype="float8")
    with pytest.raises(ValueError, match="device=tpu is unknown"):
        load_engine(folder, device="tpu")
    with pytest.raises(ValueError, match="holds no model"):
        load_engine(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        load_engine(tmp_path / "nowhere")


def test_a_run_answers_through_its_export(folder: Path) -> None:
    assert list(load_engine(folder.parent).generate([ask("words", max_new_tokens=2)]))[-1].finish == "length"
