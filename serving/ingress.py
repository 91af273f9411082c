"""The CPU half of the endpoint: HTTP in, Requests to the engine, JSON or server-sent events out."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from rayllava.fetch.images import Rules
from rayllava.records import Delta
from serving.access import AccessLog, TokenGate, check_exposure
from serving.body import read_chat
from serving.protocol import ApiError, Chat, Chunks, completion, no_such_model, refusal
from serving.replica import DRAIN_S

MAX_BODY_BYTES = 32 << 20
PING_S = 15.0
"""Silence after which a stream says that it is alive."""
RETRY_S = 1
"""What a client that finds the queue full is told to wait."""
HEALTH_S = 5.0
"""How long the engine may take to say that it lives."""


@serve.deployment(
    name="Ingress",
    graceful_shutdown_timeout_s=DRAIN_S,
    ray_actor_options={"num_cpus": 0.5},
    max_queued_requests=256,  # at each proxy, whose refusals have no body of OpenAI's shape
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_S),
)
@serve.ingress()
class Ingress:
    """Reads requests, asks the engine, writes answers. Holds no weights."""

    def __init__(
        self, engine: DeploymentHandle, *, card: dict[str, Any], fingerprint: str, token_digest: bytes | None
    ) -> None:
        check_exposure(token_digest)  # again, where Serve certainly runs
        self.engine = engine
        self.card = card
        self.fingerprint = fingerprint
        self.token_digest = token_digest
        self.rules = Rules()

    def __serve_build_asgi_app__(self) -> Starlette:
        v1 = [
            Route("/chat/completions", self.chat, methods=["POST"]),
            Route("/models", self.models),
            Route("/models/{name:path}", self.model),
        ]
        gate = Middleware(TokenGate, digest=self.token_digest)
        return Starlette(
            routes=[Mount("/v1", routes=v1, middleware=[gate]), Route("/health", self.health)],
            middleware=[Middleware(AccessLog)],
            exception_handlers={ApiError: _answer_error, HTTPException: _answer_error, 500: _answer_error},
        )

    async def chat(self, http: HTTPRequest) -> Response:
        """POST /v1/chat/completions"""
        id_ = http.state.id = f"chatcmpl-{uuid.uuid4().hex}"
        body = await _body(http)
        chat = await run_in_threadpool(read_chat, body, id=id_, model=self.card["id"], rules=self.rules)
        http.state.num_images = len(chat.request.images)
        pieces: Any = self.engine.options(stream=True).answer.remote(chat.request)
        try:
            reason = await anext(pieces)
            if reason:
                raise refusal(reason)
            if chat.stream:
                headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
                events = self._events(chat, pieces, http)
                return StreamingResponse(events, media_type="text/event-stream", headers=headers)
            deltas = [delta async for piece in pieces for delta in piece]
        except (RayError, RayServeException) as error:
            raise _engine_error(error) from error
        except asyncio.CancelledError:  # the client is gone
            pieces.cancel()
            raise
        http.state.last = deltas[-1]
        return JSONResponse(completion(chat, deltas, fingerprint=self.fingerprint))

    async def _events(
        self, chat: Chat, pieces: DeploymentResponseGenerator[Any], http: HTTPRequest
    ) -> AsyncIterator[str]:
        chunks = Chunks(chat, fingerprint=self.fingerprint)
        last: Delta | None = None
        try:
            yield chunks.start()
            async for piece in _or_none(pieces, every_s=PING_S):
                if piece is None:
                    yield chunks.PING
                    continue
                last = http.state.last = piece[-1]
                if text := "".join(delta.text for delta in piece):
                    yield chunks.text(text)
            assert last, f"{chat.request.id} ended without a piece"
            yield chunks.end(last)
        except ApiError as error:
            yield chunks.error(error)
        except (RayError, RayServeException) as error:
            yield chunks.error(_engine_error(error))
        finally:
            if last is None or last.finish is None:
                pieces.cancel()

    async def models(self, http: HTTPRequest) -> Response:
        """GET /v1/models"""
        return JSONResponse({"object": "list", "data": [self.card]})

    async def model(self, http: HTTPRequest) -> Response:
        """GET /v1/models/{id}"""
        name = http.path_params["name"]
        if name != self.card["id"]:
            raise no_such_model(name)
        return JSONResponse(self.card)

    async def health(self, http: HTTPRequest) -> Response:
        """GET /health: 200 when the engine takes work, 503 otherwise."""
        try:
            await asyncio.wait_for(self.engine.num_open.remote(), HEALTH_S)
        except (TimeoutError, RayError, RayServeException):
            return Response(status_code=503)
        return Response()


async def _body(http: HTTPRequest) -> bytes:
    """Return the body, of which no more than the limit is ever held."""
    too_large = ApiError(f"the body exceeds {MAX_BODY_BYTES} bytes; send fewer or smaller images", status=413)
    if int(http.headers.get("content-length", 0)) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    return bytes(body)


async def _or_none(pieces: AsyncIterator[Any], *, every_s: float) -> AsyncIterator[Any]:
    """Yield the pieces, and None whenever none came for a while."""
    coming = asyncio.ensure_future(anext(pieces, None))
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=every_s)
            if not done:
                yield None
                continue
            piece = coming.result()
            if piece is None:
                return
            coming = asyncio.ensure_future(anext(pieces, None))
            yield piece
    finally:
        coming.cancel()


def _engine_error(error: Exception) -> ApiError:
    if isinstance(error, BackPressureError):
        headers = {"Retry-After": str(RETRY_S)}
        text = "too many requests are waiting; try again later"
        return ApiError(text, status=429, kind="rate_limit_error", code="queue_full", headers=headers)
    if isinstance(error, RayTaskError):
        return ApiError("the engine failed; its log says why", status=500, kind="server_error")
    return ApiError("the engine is not available; try again later", status=503, kind="overloaded_error")


async def _answer_error(http: HTTPRequest, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = ApiError(f"{error.detail.lower()}: {http.method} {http.url.path[:100]}", status=error.status_code)
    if not isinstance(error, ApiError):
        error = ApiError("our mistake; it is in the log of the ingress", status=500, kind="server_error")
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)
