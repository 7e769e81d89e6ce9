"""ASGI middleware for the API key and the time limit, and error responses in OpenAI's format."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from roundwise.inference.serving.api_errors import ApiError

logger = logging.getLogger("roundwise.serve")

#: Paths that need no API key.
PUBLIC_PATHS = ("/health", "/metrics")


class Deadlines:
    """Time limits of the running requests, which end sooner when the server stops.

    Args:
        seconds: time limit of a request.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: set[asyncio.Timeout] = set()

    @asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Context manager: raises TimeoutError when the time is over."""
        async with asyncio.timeout(self._seconds) as timeout:
            self._running.add(timeout)
            try:
                yield
            finally:
                self._running.discard(timeout)

    def shorten(self, seconds: float) -> None:
        """Lets all running requests end within some seconds."""
        end = asyncio.get_running_loop().time() + seconds
        for timeout in self._running:
            timeout.reschedule(end)


class Guard:
    """ASGI middleware: refuses requests without the API key, and cuts those that exceed a time limit.

    Args:
        app: the application.
        api_key: key that clients must send; None: no key is needed.
        deadlines: time limits of connections, however slowly clients send or read.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, deadlines: Deadlines) -> None:
        self.app, self._deadlines = app, deadlines
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"] not in PUBLIC_PATHS and not self._has_key(scope):
            error = ApiError(
                401, "the API key is missing or wrong", kind="authentication_error",
                code="invalid_api_key",
            )  # fmt: skip
            await JSONResponse(error.body, error.status)(scope, receive, send)
            return
        started = False

        async def send_noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with self._deadlines.limit():
                await self.app(scope, receive, send_noting)
        except TimeoutError:  # the client sends or reads too slowly
            logger.warning("a client was too slow: its connection is closed")
            if not started:
                error = ApiError(408, "the request took too long", code="timeout")
                await JSONResponse(error.body, error.status)(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)


def handle_api_error(_: HttpRequest, error: Exception) -> Response:
    """Returns the response for an ApiError."""
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status)


def handle_disconnect(_: HttpRequest, __: Exception | None) -> Response:
    """Returns status 499, for a client that has disconnected: it is not sent."""
    return Response(status_code=499)


def handle_http_error(http: HttpRequest, error: Exception) -> Response:
    """Returns the response for an unknown path, or a method that a path does not have."""
    assert isinstance(error, HTTPException)
    body = ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}").body
    return JSONResponse(body, error.status_code, headers=error.headers)
