"""Errors in OpenAI's format, which also pass between processes."""

from __future__ import annotations

import pickle

from roundwise.inference.serving.api_errors import (
    ApiError,
    busy_error,
    stopping_error,
    timeout_error,
)


def test_an_error_survives_its_way_from_another_process() -> None:
    error = ApiError(404, "no", kind="k", param="p", code="c")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.status, str(copy), copy.body) == (404, "no", error.body)


def test_clients_retry_what_may_succeed_later() -> None:
    errors = (busy_error("full"), timeout_error(), stopping_error())
    assert [error.status for error in errors] == [429, 503, 503]
    assert [error.body["error"]["code"] for error in errors] == [
        "rate_limit_exceeded", "timeout", "shutting_down"
    ]  # fmt: skip
