"""The server's application without a network: internal failures, and clients that disconnect."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

import roundwise as rw
from roundwise.inference.generation import Generated
from roundwise.inference.serving import app as app_module
from roundwise.inference.serving.app import Server
from roundwise.inference.serving.engines import engine as engine_module
from roundwise.inference.serving.protocol import Limits

T = TypeVar("T")
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def loaded(text_model: Path) -> tuple[Any, Any]:
    return rw.load(text_model)


def scope(content_type: str, path: str) -> dict[str, Any]:
    return {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"content-type", content_type.encode()), (b"host", b"localhost")],
        "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
    }  # fmt: skip


async def ask(
    server: Server,
    *,
    gone_after: float | None = None,
    body_after: float = 0,
    content_type: str = "application/json",
    path: str = COMPLETIONS,
    **fields: Any,
) -> tuple[int, str]:
    """Sends one request as the web server would.

    The client sends its last byte, and disconnects, after some seconds.
    """
    prompt = {"prompt": "import os"} if path == COMPLETIONS else {}
    body = json.dumps({"model": "m", **prompt, **fields}).encode()
    parts = [(body[:-1], True), (body[-1:], False)] if body_after else [(body, False)]
    incoming = iter([{"type": "http.request", "body": b, "more_body": more} for b, more in parts])
    sent: list[Any] = []

    async def receive() -> Any:
        message = next(incoming, None)
        if message is not None and body_after and not message["more_body"]:
            await asyncio.sleep(body_after)
        if message is None:
            await asyncio.sleep(60 if gone_after is None else gone_after)
            return {"type": "http.disconnect"}
        return message

    async def send(message: Any) -> None:
        sent.append(message)

    await server.app(scope(content_type, path), receive, send)
    text = b"".join(message.get("body", b"") for message in sent[1:]).decode()
    return sent[0]["status"] if sent else 0, text


def run(server: Server, requests: Callable[[], Awaitable[T]]) -> T:
    """Runs requests while the server is ready to answer; afterwards nothing may be left behind."""

    async def everything() -> T:
        async with server.running():
            return await requests()

    answers = asyncio.run(everything())
    assert server.queue.open_requests == 0
    return answers


def failing(*_: Any, on_text: Any, **__: Any) -> Any:
    on_text("some ")
    raise RuntimeError("out of everything, at /secret/place")


def test_a_failure_of_the_model_ends_only_its_request(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(*loaded, "m", Limits(context=64))

    async def three() -> list[Any]:
        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
            patch.setattr(engine_module, "generate", failing)
            failed = [await ask(server), await ask(server, stream=True)]
        return [*failed, await ask(server, max_tokens=2)]

    whole, streamed, later = run(server, three)
    assert whole[0] == 500
    assert json.loads(whole[1])["error"]["message"] == "the model failed: RuntimeError"
    assert streamed[0] == 200  # the stream had started
    *events, done = [line.removeprefix("data: ") for line in streamed[1].split("\n\n") if line]
    assert json.loads(events[0])["choices"][0]["text"] == "some "
    assert json.loads(events[-1])["error"]["type"] == "server_error"
    assert done == "[DONE]"
    assert "secret" not in whole[1] + streamed[1]  # details are in the log only
    assert "secret" in caplog.text
    assert later[0] == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("gone_after", [0.0, 0.05])
def test_a_client_that_disconnects_leaves_nothing_behind(
    stream: bool, gone_after: float, loaded: tuple[Any, Any]
) -> None:
    server = Server(*loaded, "m", Limits(context=100_000))
    begun = time.monotonic()

    async def leave() -> tuple[int, str]:
        return await ask(
            server, stream=stream, gone_after=gone_after, max_tokens=50_000, temperature=0
        )

    run(server, leave)  # waits for the generation
    assert time.monotonic() - begun < 8


@pytest.mark.parametrize("answers", [1, 3])
def test_when_the_server_stops_answers_end_with_a_reason(
    answers: int, loaded: tuple[Any, Any]
) -> None:
    server = Server(*loaded, "m", Limits(context=100_000))

    async def stopped() -> list[tuple[int, str]]:
        options = {"max_tokens": 50_000, "temperature": 0}
        requests = [
            asyncio.create_task(ask(server, stream=True, n=answers, **options)),
            asyncio.create_task(ask(server, **options)),
            asyncio.create_task(ask(server, stream=True, **options)),
        ]
        while server.queue.open_requests < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        server.stop()
        begun = time.monotonic()
        ended = await asyncio.gather(*requests)
        assert time.monotonic() - begun < 3
        return [*ended, await ask(server)]

    running, whole, streamed, later = run(server, stopped)
    *events, done = [line.removeprefix("data: ") for line in running[1].split("\n\n") if line]
    assert done == "[DONE]"
    reasons = [c["finish_reason"] for e in map(json.loads, events) for c in e.get("choices", [])]
    assert reasons[-1] == "length"
    if answers > 1:  # the others had not begun
        assert json.loads(events[-1])["error"]["code"] == "shutting_down"
    for status, text in (whole, later):
        assert status == 503
        assert json.loads(text)["error"]["code"] == "shutting_down"
    assert '"shutting_down"' in streamed[1]
    assert streamed[1].endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("APPLICATION/JSON", 200),
        ("text/plain", 415),
        ("application/jsonp", 415),
    ],
)
def test_content_types_in_any_case(kind: str, status: int, loaded: tuple[Any, Any]) -> None:
    server = Server(*loaded, "m", Limits(context=64))
    assert run(server, lambda: ask(server, content_type=kind, max_tokens=1))[0] == status


def test_a_slow_body_is_refused(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.05)
    server = Server(*loaded, "m", Limits(context=64))
    status, text = run(server, lambda: ask(server, body_after=10))
    assert status == 408
    assert "took more than 0.05 seconds" in json.loads(text)["error"]["message"]


def test_bodies_of_many_clients_have_a_limit_together(loaded: tuple[Any, Any]) -> None:
    server = Server(*loaded, "m", Limits(context=64, max_bytes=100, max_requests=2))

    async def four() -> list[tuple[int, str]]:
        # 70 bytes each: the third is more than twice a hundred bytes.
        return await asyncio.gather(*(ask(server, body_after=0.2, user="x" * 20) for _ in range(4)))

    assert sorted(status for status, _ in run(server, four)) == [200, 200, 429, 429]


#: In the style of Qwen's; the answer begins where the prompt ends.
QWEN = (
    "{% if tools %}{{ tools | length }} tools {% endif %}<|im_start|>user\n{{ messages[0].content }}"
    "<|im_end|>\n<|im_start|>assistant{{ '\n' }}"
)


@pytest.mark.parametrize("stream", [True, False])
def test_tool_calls(stream: bool, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    said = 'I look. <tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]

    def generate(*_: Any, on_text: Any, **__: Any) -> Generated:
        on_text(said)
        return Generated(said, 9, len(ids), "stop", 0.1, 0.2, tuple(ids))

    monkeypatch.setattr(engine_module, "generate", generate)
    monkeypatch.setattr(model.config, "model_type", "qwen3")
    monkeypatch.setattr(tokenizer, "chat_template", QWEN)
    server = Server(model, tokenizer, "m", Limits(context=64))
    tool = {"type": "function", "function": {"name": "weather"}}
    messages = [{"role": "user", "content": "hi"}]
    status, text = run(
        server, lambda: ask(server, path=CHAT, messages=messages, tools=[tool], stream=stream)
    )
    assert status == 200
    if stream:
        chunks = [json.loads(x[6:]) for x in text.split("\n\n") if x and "[DONE]" not in x]
        choices = [chunk["choices"][0] for chunk in chunks]
        [message] = [c["delta"] for c in choices if "tool_calls" in c["delta"]]
        assert sum(bool(c["delta"].get("content")) for c in choices) == 1
    else:
        choices = json.loads(text)["choices"]
        message = choices[0]["message"]
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert message["content"] == "I look."
    assert message["tool_calls"][0]["function"] == {
        "name": "weather", "arguments": '{"city": "Rome"}'
    }  # fmt: skip
