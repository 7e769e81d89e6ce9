"""The server's application without a network: internal failures, and clients that disconnect."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

import roundwise as rw
from roundwise.inference.serving import queue as queue_module
from roundwise.inference.serving.app import Limits, Server


@pytest.fixture(scope="module")
def loaded(text_model: Path) -> tuple[Any, Any]:
    return rw.load(text_model)


def scope(path: str = "/v1/completions") -> dict[str, Any]:
    return {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
    }  # fmt: skip


async def ask(server: Server, *, gone_after: float | None = None, **fields: Any) -> tuple[int, str]:
    """Sends one request as the web server would; the client disconnects after some seconds."""
    body = json.dumps({"model": "m", "prompt": "import os", **fields}).encode()
    incoming = iter([{"type": "http.request", "body": body, "more_body": False}])
    sent: list[Any] = []

    async def receive() -> Any:
        message = next(incoming, None)
        if message is None:
            await asyncio.sleep(60 if gone_after is None else gone_after)
            return {"type": "http.disconnect"}
        return message

    async def send(message: Any) -> None:
        sent.append(message)

    await server.app(scope(), receive, send)
    text = b"".join(message.get("body", b"") for message in sent[1:]).decode()
    return sent[0]["status"] if sent else 0, text


def failing(*_: Any, on_text: Any, **__: Any) -> Any:
    on_text("some ")
    raise RuntimeError("out of everything, at /secret/place")


def test_a_failure_of_the_model_ends_only_its_request(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(*loaded, "m", Limits(context=64))

    async def both() -> tuple[Any, Any]:
        return await ask(server), await ask(server, stream=True)

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(queue_module, "generate", failing)
        whole, streamed = asyncio.run(both())
    assert whole[0] == 500
    assert json.loads(whole[1])["error"]["message"] == "the model failed: RuntimeError"
    assert streamed[0] == 200  # the stream had started
    events = [json.loads(line.removeprefix("data: ")) for line in streamed[1].split("\n\n") if line]
    assert events[0]["choices"][0]["text"] == "some "
    assert events[-1]["error"]["type"] == "server_error"
    assert "secret" not in whole[1] + streamed[1]  # details are in the log only
    assert "secret" in caplog.text
    assert server.queue.open_requests == 0
    assert asyncio.run(ask(server, max_tokens=2))[0] == 200
    server.queue.close()


def test_a_failure_of_the_tokenizer_ends_only_its_request(
    loaded: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def tokenizer(*_: Any, **__: Any) -> Any:
        raise RuntimeError("already borrowed")

    server = Server(loaded[0], tokenizer, "m", Limits(context=64))
    status, text = asyncio.run(ask(server))
    assert status == 500
    assert json.loads(text)["error"]["message"] == "the model failed: RuntimeError"
    assert "already borrowed" in caplog.text
    server.queue.close()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("gone_after", [0.0, 0.05])
def test_a_client_that_disconnects_leaves_nothing_behind(
    stream: bool, gone_after: float, loaded: tuple[Any, Any]
) -> None:
    server = Server(*loaded, "m", Limits(context=100_000))
    begun = time.monotonic()
    asyncio.run(ask(server, stream=stream, gone_after=gone_after, max_tokens=50_000, temperature=0))
    assert server.queue.open_requests == 0
    server.queue.close()  # waits for the generation
    assert time.monotonic() - begun < 5
