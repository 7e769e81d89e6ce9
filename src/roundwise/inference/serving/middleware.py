"""ASGI middleware for the API key and the time limit, and error responses in OpenAI's format."""

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
    """ASGI middleware: refuses requests without the API key, and cuts those that exceed a time limit.

    Args:
        app: the application.
        api_key: key that clients must send; None: no key is needed.
        seconds: time limit of a connection, however slowly the client sends or reads.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, seconds: float) -> None:
        self.app, self.seconds = app, seconds
        self._expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        authorization = dict(scope["headers"]).get(b"authorization", b"")
        is_public = scope["path"] == "/health"
        if (
            self._expected
            and not is_public
            and not hmac.compare_digest(authorization, self._expected)
        ):
            error = ApiError(
                401, "the API key is missing or wrong", kind="authentication_error",
                code="invalid_api_key",
            )  # fmt: skip
            await JSONResponse(error.body, error.status)(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.seconds):
                await self.app(scope, receive, send)
        except TimeoutError:  # the client sends or reads too slowly
            logger.warning("a client was too slow: its connection is closed")


def as_api_error(error: Exception) -> ApiError:
    """Returns the error to send to the client; details of unexpected errors go to the log only."""
    if isinstance(error, ApiError):
        return error
    logger.error("a request failed", exc_info=error)
    return ApiError(500, f"the model failed: {type(error).__name__}", kind="server_error")


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
