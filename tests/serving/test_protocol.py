"""Bodies of chat completions and the answers to them, without a server."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from PIL import Image

from rayllava.fetch.images import Rules
from rayllava.records import Delta, Turn
from serving.body import NEUTRAL, REST_OF_CONTEXT, read_chat
from serving.protocol import ApiError, Chat, Chunks, completion, refusal

HELLO = [{"role": "user", "content": "hello"}]


def picture(size: tuple[int, int] = (6, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


PICTURE = "data:image/png;base64," + base64.b64encode(picture()).decode()


def chat(messages: Any = HELLO, **fields: Any) -> Chat:
    body = {"model": "m", "messages": messages, **fields}
    return read_chat(json.dumps(body).encode(), id="chatcmpl-1", model="m", rules=Rules())


def error(messages: Any = HELLO, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat(messages, **fields)
    assert set(caught.value.body()["error"]) == {"message", "type", "param", "code"}
    return caught.value


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(url: Any = PICTURE) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


def test_a_bare_request_has_openais_defaults() -> None:
    asked = chat()
    assert asked.request.turns == (Turn("user", "hello"),)
    assert (asked.request.temperature, asked.request.top_p, asked.request.seed) == (1.0, 1.0, None)
    assert asked.request.max_new_tokens == REST_OF_CONTEXT
    assert not asked.stream and not asked.include_usage


def test_every_field_reaches_the_request() -> None:
    request = chat(temperature=0, top_p=0.5, seed=7, max_tokens=9, stop=["a", "b"]).request
    assert (request.temperature, request.top_p, request.seed, request.max_new_tokens) == (0, 0.5, 7, 9)
    assert request.stop == ("a", "b")
    assert chat(stop="end").request.stop == ("end",)
    assert chat(max_tokens=9, max_completion_tokens=5).request.max_new_tokens == 5
    asked = chat(stream=True, stream_options={"include_usage": True})
    assert asked.stream and asked.include_usage


def test_null_means_the_default() -> None:
    names = ("temperature", "top_p", "stop", "seed", "max_tokens", "stream", "stream_options", *NEUTRAL)
    assert chat(**dict.fromkeys(names)).request == chat().request


def test_pictures_are_marked_in_front_of_the_text_in_their_order() -> None:
    second = "data:image/png;base64," + base64.b64encode(picture((9, 9))).decode()
    request = chat(
        user(text("what"), image({"url": PICTURE, "detail": "low"}), text("is it?"), image(second))
    ).request
    assert request.turns == (Turn("user", "<image>\n<image>\nwhat\nis it?"),)
    assert request.images == (picture(), picture((9, 9)))


def test_a_dialogue_keeps_its_turns() -> None:
    said = [
        ("developer", "be brief"),
        ("user", [image(), text("what?")]),
        ("assistant", "a digit"),
        ("user", "which?"),
    ]
    request = chat([{"role": role, "content": content} for role, content in said]).request
    assert [turn.role for turn in request.turns] == ["system", "user", "assistant", "user"]
    assert request.turns[1].text == "<image>\nwhat?"


def test_no_words_can_stand_for_a_picture() -> None:
    for words in ("<image>", "<ima<image>ge>", "< <image><image>"):
        request = chat([{"role": "system", "content": words}, *user(image(), text(words))]).request
        assert "".join(turn.text for turn in request.turns).count("<image>") == 1


def test_what_leaves_the_answer_alone_is_ignored() -> None:
    extras = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "reasoning_effort": "low"}
    assert chat(**extras, something_new=[1], parallel_tool_calls=True).request == chat().request
    neutral = {name: values[0] for name, values in NEUTRAL.items() if values}
    assert chat(**neutral).request == chat().request


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("n", True),
        ("logprobs", True),
        ("top_logprobs", 5),
        ("presence_penalty", 0.1),
        ("frequency_penalty", -1),
        ("logit_bias", {"50": -100}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["audio"]),
        ("top_k", 5),
        ("repetition_penalty", 1.1),
        ("guided_json", {}),
        ("ignore_eos", True),
        ("chat_template", "x"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name: str, value: Any) -> None:
    refused = error(**{name: value})
    assert (refused.status, refused.param, refused.code) == (400, name, "unsupported_parameter")
    assert name in refused.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": "9"}, "max_completion_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": 5}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"model": 5}, "model"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages.0.content"),
        ({"messages": user({"type": "text"})}, "messages.0.content.0.text"),
        ({"messages": user({"type": "input_audio"})}, "messages.0.content.0"),
        ({"messages": user(image({"uri": "x"}))}, "messages.0.content.0.image_url.url"),
        ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [{}]}]}, "messages.1.tool_calls"),
        ({"messages": [{"role": "assistant", "content": "hi"}, *HELLO]}, "messages.0.role"),
        ({"messages": [*HELLO, {"role": "system", "content": "hi"}]}, "messages.1.role"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "hi"}]}, "messages"),
        ({"messages": [{"role": "system", "content": [image()]}, *HELLO]}, "messages.0.content.0"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    refused = error(**fields)
    assert (refused.status, refused.kind, refused.param) == (400, "invalid_request_error", param)
    assert param in refused.message or param.startswith("messages")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"hi"', b"\xff", b'{"temperature": NaN}', b"[" * 100_000])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        read_chat(body, id="1", model="m", rules=Rules())
    assert caught.value.status == 400


def test_an_unknown_model_is_not_found() -> None:
    refused = error(model="other")
    assert (refused.status, refused.code, refused.param) == (404, "model_not_found", "model")


@pytest.mark.parametrize(
    "url", ["https://example.org/secret.png", "file:///secret", "data:text/plain;base64,c2VjcmV0"]
)
def test_a_bad_address_is_refused_without_repeating_it(url: str) -> None:
    for part in (image(url), image({"url": url})):
        refused = error(user(part))
        assert (refused.status, refused.param) == (400, "messages.0.content.0.image_url.url")
        assert "secret" not in refused.message and "c2Vj" not in refused.message


def test_too_many_images_are_refused() -> None:
    assert "more than 8 images" in error(user(*[image()] * 9)).message
    assert len(chat(user(*[image()] * 8)).request.images) == 8


def test_too_long_a_text_is_refused_before_it_is_tokenised() -> None:
    assert error([{"role": "user", "content": "x" * (1 << 20) + "x"}]).code == "context_length_exceeded"


def test_the_prompt_paths_words_for_length_are_understood() -> None:
    assert refusal("the prompt takes 900 positions; max_length=512 is the most").code == "context_length_exceeded"
    assert refusal("image 1 of 1: not an image").code is None


DELTAS = [Delta("chatcmpl-1", "a ", 1, 600), Delta("chatcmpl-1", "b\u2028", 3, 600, "length")]


def test_an_answer_has_openais_shape() -> None:
    body = completion(chat(), DELTAS, fingerprint="fp")
    answer = ChatCompletion.model_validate(body, strict=True)
    assert answer.choices[0].message.content == "a b\u2028"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage and (answer.usage.prompt_tokens, answer.usage.total_tokens) == (600, 603)


def test_an_answer_that_was_given_up_is_an_error() -> None:
    with pytest.raises(ApiError) as caught:
        completion(chat(), [Delta("chatcmpl-1", "", 1, 600, "abort")], fingerprint="fp")
    assert caught.value.status == 500


@pytest.mark.parametrize("counted", [True, False])
def test_a_stream_begins_with_the_role_and_ends_with_done(counted: bool) -> None:
    chunks = Chunks(chat(stream=True, stream_options={"include_usage": counted}), fingerprint="fp")
    stream = chunks.start() + "".join(chunks.text(delta.text) for delta in DELTAS) + chunks.end(DELTAS[-1])
    events = stream.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    # One event is one line, for whatever a client takes for the end of one.
    values = [json.loads(event.removeprefix("data: ")) for event in events[:-2] if len(event.splitlines()) == 1]
    said = [ChatCompletionChunk.model_validate(value, strict=True) for value in values]
    assert said[0].choices[0].delta.role == "assistant" and said[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said if chunk.choices) == "a b\u2028"
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in said}) == 1
    last = values[-2] if counted else values[-1]
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    if counted:
        assert all(value["usage"] is None for value in values[:-1])
        assert values[-1]["choices"] == [] and values[-1]["usage"]["total_tokens"] == 603
    else:
        assert not any("usage" in value for value in values)
