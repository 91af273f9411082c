"""OpenAI's chat completions: the nouns, and how an answer or an error is written.

body --body.read_chat--> Chat(Request, stream, ...) --engine--> [Delta] --completion--> JSON
                                                                 Delta  --Chunks-----> server-sent events
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rayllava.records import Delta, Request


class ApiError(Exception):
    """A request that gets an error instead of an answer, in OpenAI's shape."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.kind, self.param, self.code = message, status, kind, param, code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat completion as it was asked for."""

    request: Request
    model: str
    stream: bool
    include_usage: bool
    """Whether a stream ends with its usage."""
    created: int = field(default_factory=lambda: int(time.time()))


def no_such_model(name: str) -> ApiError:
    message = f"the model {name[:100]!r} does not exist; GET /v1/models lists what is served"
    return ApiError(message, status=404, param="model", code="model_not_found")


def refusal(reason: str) -> ApiError:
    """Return the error for a request that cannot be answered, whatever of it is wrong."""
    # The prompt path has no class of its own for length; these are its words.
    too_long = "max_length" in reason or "context" in reason
    return ApiError(reason, param="messages", code="context_length_exceeded" if too_long else None)


def completion(chat: Chat, deltas: Iterable[Delta], *, fingerprint: str) -> dict[str, Any]:
    """Return the body of an answer that is not streamed."""
    said = list(deltas)
    message = {"role": "assistant", "content": "".join(delta.text for delta in said), "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(said[-1])}
    head = {"id": chat.request.id, "object": "chat.completion", "created": chat.created, "model": chat.model}
    return {**head, "system_fingerprint": fingerprint, "choices": [choice], "usage": usage(said[-1])}


def usage(last: Delta) -> dict[str, int]:
    """Return the counts of an answer; a picture counts with all its positions."""
    total = last.num_prompt_tokens + last.num_tokens
    return {
        "prompt_tokens": last.num_prompt_tokens,
        "completion_tokens": last.num_tokens,
        "total_tokens": total,
    }


class Chunks:
    """Writes the events of one stream."""

    DONE = "data: [DONE]\n\n"
    PING = ": ping\n\n"
    """A comment, which keeps idle proxies from hanging up."""

    def __init__(self, chat: Chat, *, fingerprint: str) -> None:
        self._head = {
            "id": chat.request.id,
            "object": "chat.completion.chunk",
            "created": chat.created,
            "model": chat.model,
            "system_fingerprint": fingerprint,
        }
        self._counts = chat.include_usage

    def start(self) -> str:
        return self._event({"role": "assistant", "content": ""})

    def text(self, text: str) -> str:
        return self._event({"content": text})

    def end(self, last: Delta) -> str:
        """Return the last events of a whole answer."""
        events = self._event({}, finish_reason=_finish_reason(last))
        if self._counts:
            events += _event({**self._head, "choices": [], "usage": usage(last)})
        return events + self.DONE

    def error(self, error: ApiError) -> str:
        """Return the last events of a stream that broke: its status is sent already."""
        return _event(error.body()) + self.DONE

    def _event(self, delta: dict[str, str], *, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event({**self._head, "choices": [choice], **({"usage": None} if self._counts else {})})


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _finish_reason(last: Delta) -> str:
    if last.finish not in ("stop", "length"):
        raise ApiError("the answer was given up", status=500, kind="server_error")
    return last.finish
