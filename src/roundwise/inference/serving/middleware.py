"""What stands around the routes: the key, the time limit, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import hmac
import logging

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from roundwise.inference.serving.protocol import ApiError

logger = logging.getLogger("roundwise.serve")


class Guard:
    """Lets nobody in without the key, and cuts what takes too long, be it the client's fault."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, seconds: float) -> None:
        self.app, self.seconds = app, seconds
        self._expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"authorization", b"")
        public = scope["path"] == "/health"
        if self._expected and not public and not hmac.compare_digest(sent, self._expected):
            error = ApiError(
                401, "the API key is missing or wrong", kind="authentication_error",
                code="invalid_api_key",
            )  # fmt: skip
            await JSONResponse(error.body, error.status)(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.seconds):
                await self.app(scope, receive, send)
        except TimeoutError:  # one that sends or reads too slowly; the connection is closed
            logger.warning("a client was too slow: its connection is closed")


def as_api_error(error: Exception) -> ApiError:
    """What a client is told; what it is not told goes to the log."""
    if isinstance(error, ApiError):
        return error
    logger.error("a request failed", exc_info=error)
    return ApiError(500, f"the model failed: {type(error).__name__}", kind="server_error")


def answer_api_error(_: HttpRequest, error: Exception) -> Response:
    """In OpenAI's shape."""
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status)


def answer_nobody(_: HttpRequest, __: Exception | None) -> Response:
    """The client has gone; nobody reads this."""
    return Response(status_code=499)


def answer_http_error(http: HttpRequest, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    body = ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}").body
    return JSONResponse(body, error.status_code, headers=error.headers)
