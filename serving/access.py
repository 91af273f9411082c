"""Who may come in, and the line that is written when they leave."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import time
from typing import Any

import ray
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayllava.records import Delta
from serving.protocol import ApiError

log = logging.getLogger("ray.serve")


class TokenGate:
    """Lets in who brings the token, and everybody when there is none."""

    def __init__(self, app: ASGIApp, *, digest: bytes | None) -> None:
        self.app = app
        self.digest = digest
        """SHA-256 of the token."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.digest is not None and scope["type"] == "http":
            kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
            digest = hashlib.sha256(token.strip().encode()).digest()
            if kind.lower() != "bearer" or not hmac.compare_digest(digest, self.digest):
                raise ApiError(
                    "this endpoint wants its token; send Authorization: Bearer TOKEN",
                    status=401,
                    kind="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        await self.app(scope, receive, send)


class AccessLog:
    """Writes a line a request: id, status, counts, seconds; never what was asked or said."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state: dict[str, Any] = {}
        scope["state"] = state
        status, whole = 499, False
        started = time.monotonic()

        async def send_seen(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            whole = whole or (message["type"] == "http.response.body" and not message.get("more_body"))

        try:
            await self.app(scope, receive, send_seen)
        except Exception:
            status = 500
            raise
        finally:
            if "id" in state:
                last: Delta | None = state.get("last")
                log.info(
                    "%s: %s%s, %d images, %d + %d tokens, %s, %.2f s",
                    state["id"],
                    status,
                    "" if whole else " cut off",
                    state.get("num_images", 0),
                    last.num_prompt_tokens if last else 0,
                    last.num_tokens if last else 0,
                    (last.finish if last else None) or "unfinished",
                    time.monotonic() - started,
                )


def check_exposure(token: str | bytes | None) -> None:
    """Raise ValueError when others than this machine could connect and no token keeps them out."""
    host = _host()
    if not token and host and not _is_loopback(host):
        raise ValueError(
            f"Serve listens on {host} and there is no token; set RAYLLAVA_API_TOKEN, or listen on 127.0.0.1"
        )


def _host() -> str | None:
    """Return the address that Serve listens on, or will; it has no public word for that."""
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    return (client.http_config if client else HTTPOptions()).host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
