"""The API key, the time limit of a connection, and errors in OpenAI's format."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from roundwise.inference.serving.api_errors import ApiError
from roundwise.inference.serving.encoder import as_api_error
from roundwise.inference.serving.middleware import (
    Deadlines,
    Guard,
    handle_api_error,
    handle_disconnect,
    handle_http_error,
)


def scope(path: str = "/v1/models", key: str | None = None) -> dict[str, Any]:
    headers = [] if key is None else [(b"authorization", key.encode())]
    return {"type": "http", "method": "GET", "path": path, "headers": headers, "query_string": b""}


def ask(guard: Guard, http: dict[str, Any]) -> tuple[int, bytes]:
    """Sends a request: the status and body of the response."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    asyncio.run(guard(http, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/v1/models", "Bearer secret", 200),
        ("/v1/models", "bearer secret", 200),
        ("/v1/models", "BEARER  secret ", 200),
        ("/v1/models", "Bearer wrong", 401),
        ("/v1/models", "Bearer Secret", 401),
        ("/v1/models", "Bearer", 401),
        ("/v1/models", "Basic secret", 401),
        ("/v1/models", "Bearersecret", 401),
        ("/v1/models", "secret", 401),
        ("/v1/models", None, 401),
        ("/health", None, 200),
    ],
)
def test_the_key(path: str, key: str | None, status: int) -> None:
    guard = Guard(PlainTextResponse("in"), api_key="secret", deadlines=Deadlines(10))
    answered, body = ask(guard, scope(path, key))
    assert answered == status
    if status == 401:
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
    else:
        assert body == b"in"


def test_without_a_key_every_request_is_accepted() -> None:
    guard = Guard(PlainTextResponse("in"), api_key=None, deadlines=Deadlines(10))
    assert ask(guard, scope()) == (200, b"in")


def test_other_protocols_pass() -> None:
    seen = []

    async def app(scope: Any, *_: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(
        Guard(app, api_key="secret", deadlines=Deadlines(10))({"type": "lifespan"}, None, None)
    )
    assert seen == ["lifespan"]


async def stuck(*_: Any) -> None:
    await asyncio.sleep(60)


def test_a_request_that_takes_too_long_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(stuck, api_key=None, deadlines=Deadlines(0.05))
    with caplog.at_level(logging.WARNING):
        status, body = ask(guard, scope())
    assert status == 408
    assert json.loads(body)["error"]["code"] == "timeout"
    assert "too slow" in caplog.text


def test_an_answer_that_is_not_read_is_cut() -> None:
    async def begins(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await asyncio.sleep(60)

    guard = Guard(begins, api_key=None, deadlines=Deadlines(0.05))
    assert ask(guard, scope()) == (200, b"")


def test_when_the_server_stops_requests_have_less_time() -> None:
    deadlines = Deadlines(60)

    async def stopping() -> float:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        guard = Guard(stuck, api_key=None, deadlines=deadlines)
        requests = [asyncio.create_task(guard(scope(), None, send)) for _ in range(3)]
        await asyncio.sleep(0.01)
        begun = asyncio.get_running_loop().time()
        deadlines.shorten(0.05)
        await asyncio.gather(*requests)
        assert [message["status"] for message in sent[::2]] == [408, 408, 408]
        return asyncio.get_running_loop().time() - begun

    assert asyncio.run(stopping()) < 5


def test_details_of_unexpected_errors_are_logged_only(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        error = as_api_error(RuntimeError("at /secret/place"))
    assert (error.status, str(error)) == (500, "the model failed: RuntimeError")
    assert "/secret/place" in caplog.text
    expected = ApiError(404, "no such model")
    assert as_api_error(expected) is expected


def test_responses_to_errors() -> None:
    http = Request(scope("/v1/nothing"))
    response = handle_api_error(http, ApiError(400, "too long", param="prompt", code="c"))
    assert response.status_code == 400
    assert json.loads(bytes(response.body)) == {
        "error": {
            "message": "too long", "type": "invalid_request_error", "param": "prompt", "code": "c"
        }
    }  # fmt: skip
    response = handle_http_error(http, HTTPException(405, headers={"Allow": "POST"}))
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    message = json.loads(bytes(response.body))["error"]["message"]
    assert message == "GET /v1/nothing: Method Not Allowed"
    assert handle_disconnect(http, None).status_code == 499
