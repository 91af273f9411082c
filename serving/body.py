"""What the body of a chat completion asks for.

    JSON --NEUTRAL--> no field that we lack --_Body--> types and bounds --_dialogue--> turns and pictures

A field is understood, refused by name, or known to leave the answer alone; none that could change it is ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rayllava.fetch.address import read_image
from rayllava.fetch.images import Rules
from rayllava.records import IMAGE_MARK, Request, Role, Turn
from serving.protocol import ApiError, Chat, no_such_model, refusal

MAX_MESSAGES = 512
MAX_CHARS = 1 << 20
"""Of all text of a request: far beyond any context, and still quick to tokenise."""

REST_OF_CONTEXT = 1 << 30
"""`max_new_tokens` of a request that names none; the engine ends every answer where its context is full."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": ([],),
    "guided_grammar": (),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "top_k": (0, -1),
    "min_p": (0,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}
"""Fields of OpenAI's and vLLM's that are not implemented, and the values with which they change nothing."""


def read_chat(body: bytes, *, id: str, model: str, rules: Rules) -> Chat:
    """Return what a body asks of `model`; ApiError naming the field when it cannot be done."""
    wire = _parse(body)
    if wire.model != model:
        raise no_such_model(wire.model)
    turns, images = _dialogue(wire.messages, rules)
    request = Request(
        id=id,
        turns=turns,
        images=images,
        max_new_tokens=wire.max_completion_tokens or wire.max_tokens or REST_OF_CONTEXT,
        temperature=wire.temperature,
        top_p=wire.top_p,
        seed=wire.seed,
        stop=tuple(wire.stop),
    )
    return Chat(request, model, wire.stream, wire.stream_options.include_usage)


class _Wire(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class _Address(_Wire):
    url: str


class _Text(_Wire):
    type: Literal["text"]
    text: str


class _Image(_Wire):
    type: Literal["image_url"]
    image_url: Annotated[_Address, BeforeValidator(lambda it: {"url": it} if isinstance(it, str) else it)]


_Content = Annotated[
    list[Annotated[_Text | _Image, Field(discriminator="type")]],
    BeforeValidator(lambda it: [{"type": "text", "text": it}] if isinstance(it, str) else [] if it is None else it),
]
"""A string, null, or a list of parts."""


class _Message(_Wire):
    role: Literal["system", "developer", "user", "assistant"]
    content: _Content = []
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None


class _StreamOptions(_Wire):
    include_usage: bool = False


class _Body(_Wire):
    """The fields that mean something here; null means the default everywhere."""

    model: str
    messages: list[_Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]],
        Field(max_length=4),
        BeforeValidator(lambda it: [it] if isinstance(it, str) else it),
    ] = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()


def _parse(body: bytes) -> _Body:
    try:
        tree = json.loads(body.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError("the body is not JSON in UTF-8") from error
    if not isinstance(tree, dict):
        raise ApiError("the body must be a JSON object")
    given = {name: value for name, value in tree.items() if value is not None}
    for name in NEUTRAL.keys() & given.keys():
        if not any(_same(given[name], value) for value in NEUTRAL[name]):
            raise ApiError(f"{name} is not supported; leave it out", param=name, code="unsupported_parameter")
    try:
        return _Body.model_validate(given)
    except ValidationError as error:
        raise _first(error) from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _same(value: Any, neutral: Any) -> bool:
    """Return whether they are equal as JSON: true is not 1, but 1 is 1.0."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _first(error: ValidationError) -> ApiError:
    """Return the error of the first wrong field, without what it held: that may be a picture."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    # Behind the number of a part stands the tag that chose its type; it is no field.
    path = [str(key) for at, key in enumerate(first["loc"]) if not (at == 4 and key in ("text", "image_url"))]
    param = ".".join(path)
    reason = "is missing" if first["type"] == "missing" else f"is wrong: {first['msg'].lower()}"
    if first["type"] == "union_tag_invalid":
        reason = "is of a type that is not supported; use text or image_url"
    if path[-1] in ("tool_calls", "function_call"):
        reason = "is not supported; leave it out"
    return ApiError(f"{param} {reason}", param=param)


def _dialogue(messages: list[_Message], rules: Rules) -> tuple[tuple[Turn, ...], tuple[bytes, ...]]:
    """Return a turn for each message, its pictures marked in front of its text, and all pictures."""
    turns: list[Turn] = []
    images: list[bytes] = []
    num_chars = 0
    for at, message in enumerate(messages):
        role: Role = "system" if message.role == "developer" else message.role
        if role == "system" and any(turn.role != "system" for turn in turns):
            raise ApiError("a system message must come first", param=f"messages.{at}.role")
        if role == "assistant" and (not turns or turns[-1].role != "user"):
            raise ApiError("the assistant can only answer the user", param=f"messages.{at}.role")
        texts, marks = [], ""
        for part_at, part in enumerate(message.content):
            param = f"messages.{at}.content.{part_at}"
            if isinstance(part, _Text):
                num_chars += len(part.text)
                texts.append(part.text.replace(IMAGE_MARK, "< image>"))  # only our own mark is a picture
                continue
            if role != "user":
                raise ApiError("only the user can show images", param=param)
            if len(images) == rules.max_images:
                raise ApiError(f"more than {rules.max_images} images in one request; send fewer", param=param)
            images.append(_image(part.image_url.url, rules, f"{param}.image_url.url"))
            marks += f"{IMAGE_MARK}\n"
        turns.append(Turn(role, marks + "\n".join(texts)))
    if turns[-1].role != "user":
        raise ApiError("the last message must be the user's", param="messages")
    if num_chars > MAX_CHARS:
        raise refusal(f"the messages hold {num_chars} characters, more than any context here; shorten them")
    return tuple(turns), tuple(images)


def _image(url: str, rules: Rules, param: str) -> bytes:
    try:
        return read_image(url, rules)
    except ValueError as error:
        raise ApiError(str(error), param=param, code="invalid_image") from error
