"""What every request passes before its route: its size and time, the key, and the count of it."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from zip_rc_jax.serving.errors import ApiError
from zip_rc_jax.serving.metrics import Metrics

READ_SECONDS = 30.0  # in which the body must have come

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Limits:
    """An ASGI application around another one. It reads the body, and counts what is answered."""

    def __init__(
        self, app: App, metrics: Metrics, paths: frozenset[str], max_bytes: int, api_key: str
    ):
        """Args:
        paths: that are counted under their own name.
        max_bytes: of a body.
        api_key: that requests under /v1 must bring; "" asks for none.
        """
        self._app, self._metrics, self._paths = app, metrics, paths
        self._max_bytes, self._key = max_bytes, api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            self._check_key(scope)
            async with asyncio.timeout(READ_SECONDS):
                body = await self._read(scope, receive)
        except TimeoutError:
            late = ApiError(408, f"the body did not come within {READ_SECONDS:g} seconds")
            await late.response()(scope, receive, counted)
            return
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return
        if body is None:  # the client has gone
            return
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> MutableMapping[str, Any]:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, replay, counted)

    def _check_key(self, scope: Scope) -> None:
        """Compares in constant time. Raises ApiError without the right key."""
        if not self._key or not scope["path"].startswith("/v1"):
            return
        given = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
        if not hmac.compare_digest(given, b"Bearer " + self._key):
            message = "the API key is missing or wrong. Fix: send Authorization: Bearer KEY."
            raise ApiError(401, message, code="invalid_api_key")

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client went away. Raises ApiError for one that is too large."""
        message = (
            f"the body has more than {self._max_bytes} bytes. Fix: send less, or raise "
            "--max-body-bytes."
        )
        too_large = ApiError(413, message, code="body_too_large")
        length = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            raise too_large
        parts, size, more = [], 0, True
        while more:
            received = await receive()
            if received["type"] == "http.disconnect":
                return None
            parts.append(received.get("body", b""))
            size += len(parts[-1])
            if size > self._max_bytes:
                raise too_large
            more = received.get("more_body", False)
        return b"".join(parts)
