"""Errors that are sent to clients, in OpenAI's format."""

from __future__ import annotations

from functools import partial
from typing import Any


class ApiError(Exception):
    """Error that is sent to the client as OpenAI's error object.

    Args:
        status: HTTP status.
        message: one sentence for the client.
        kind: OpenAI's error type.
        param: name of the field that is wrong.
        code: OpenAI's error code.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def __reduce__(self) -> Any:
        """Makes copies between processes complete."""
        error = self.body["error"]
        options: dict[str, Any] = {
            "kind": error["type"], "param": error["param"], "code": error["code"]
        }  # fmt: skip
        return partial(ApiError, self.status, str(self), **options), ()


def busy_error(message: str) -> ApiError:
    """Returns the error for a request beyond a limit of number; its status makes clients retry."""
    return ApiError(
        429, f"{message}: try again later", kind="rate_limit_error", code="rate_limit_exceeded"
    )


def timeout_error() -> ApiError:
    """Returns the error for a request that waited longer than its time limit."""
    return ApiError(
        503, "the server is busy: the time limit passed while this request was waiting",
        kind="server_error", code="timeout",
    )  # fmt: skip


def stopping_error() -> ApiError:
    """Returns the error for a request that is not answered because the server stops."""
    return ApiError(503, "the server is stopping", kind="server_error", code="shutting_down")
