"""The encoder's processes: limits of time and memory, and requests that do not wait for others."""

from __future__ import annotations

import asyncio
import io
import json
import pickle
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import transformers

from roundwise.inference.serving import encoder_process
from roundwise.inference.serving.api_errors import ApiError
from roundwise.inference.serving.encoder import Encoded, Encoder
from roundwise.inference.serving.encoder_process import EncoderPool, run_loop
from roundwise.inference.serving.protocol import ChatRequest, CompletionRequest, Limits

T = TypeVar("T")

#: Chat templates that do not end, or take too much: loops, recursion in macros, and long texts.
ENDLESS = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}x",
    "macros": "{% macro f(n) %}{{ f(n - 1) if n else '' }}{{ f(n - 1) if n else '' }}{% endmacro %}"
    "{{ f(60) }}",
    "filters": "{% for i in range(99999) %}{% set _ = range(99999) | sort | list %}{% endfor %}x",
    "conditions": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}"
    "{% endfor %}x",
}
HUGE = {
    "a product": "{{ 'abcdefgh' * 1000000000 }}",
    "a list": "{% set x = [[0] * 100000000] %}{{ x * 100 }}",
    "a list that grows": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
}


def encoder(tiny: Path, template: str | None = None) -> Encoder:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = template
    return Encoder(tokenizer, "m", 4096, Limits(context=2048))


def run(pool: EncoderPool, work: Callable[[], Awaitable[T]]) -> T:
    async def everything() -> T:
        try:
            return await work()
        finally:
            await pool.close()

    return asyncio.run(everything())


def text(prompt: Any = "import os") -> tuple[bytes, type[CompletionRequest]]:
    return json.dumps({"model": "m", "prompt": prompt}).encode(), CompletionRequest


def chat() -> tuple[bytes, type[ChatRequest]]:
    messages = [{"role": "user", "content": "hi"}]
    return json.dumps({"model": "m", "messages": messages}).encode(), ChatRequest


def test_it_answers_what_the_encoder_answers(tiny: Path) -> None:
    here = encoder(tiny)
    pool = EncoderPool(here)

    async def both() -> list[Any]:
        with pytest.raises(ApiError, match="the prompt is empty"):
            await pool.encode(*text(""))
        return [await pool.encode(*text()), await pool.encode(*text(["a"] * 64))]

    assert run(pool, both) == [here.encode(*text()), here.encode(*text(["a"] * 64))]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_not_end_is_stopped(name: str, tiny: Path) -> None:
    pool = EncoderPool(encoder(tiny, ENDLESS[name]), seconds=0.5)

    async def ask() -> None:
        await pool.encode(*text())  # warm
        waiting = asyncio.create_task(pool.encode(*chat()))
        await asyncio.sleep(0.1)
        begun = time.monotonic()
        await pool.encode(*text())  # texts do not wait for it
        await pool.encode(*text(["a" * 100] * 60))
        assert time.monotonic() - begun < 0.3
        with pytest.raises(
            ApiError, match=r"took more than 0\.5 seconds, and was stopped"
        ) as error:
            await waiting
        assert (error.value.status, error.value.body["error"]["code"]) == (
            400, "encoding_limit_exceeded"
        )  # fmt: skip
        with pytest.raises(ApiError, match="took more than"):  # the next one has a new process
            await pool.encode(*chat())

    run(pool, ask)


@pytest.mark.parametrize("name", HUGE)
def test_a_template_that_takes_all_memory_is_stopped(name: str, tiny: Path) -> None:
    pool = EncoderPool(encoder(tiny, HUGE[name]), seconds=3)

    async def ask() -> None:
        for _ in range(2):
            with pytest.raises(ApiError, match=r"too much memory|was stopped"):
                await pool.encode(*chat())

    run(pool, ask)


def test_small_requests_do_not_wait_for_large_ones(tiny: Path) -> None:
    pool = EncoderPool(encoder(tiny), seconds=120)

    async def ask() -> None:
        await pool.encode(*text())
        with pytest.raises(ApiError, match="the model's context is"):
            await pool.encode(*text("a" * 70_000))  # warm
        large = asyncio.create_task(pool.encode(*text("some words " * 170_000)))
        await asyncio.sleep(0.05)
        for _ in range(5):
            await pool.encode(*text())
        assert not large.done()
        with pytest.raises(ApiError, match="the model's context is"):
            await large

    run(pool, ask)


def test_when_it_is_killed_requests_fail_as_the_server_stops(tiny: Path) -> None:
    pool = EncoderPool(encoder(tiny, ENDLESS["loops"]), seconds=60)

    async def ask() -> None:
        running, waiting = (asyncio.create_task(pool.encode(*chat())) for _ in range(2))
        starting = asyncio.create_task(pool.encode(*text()))
        await asyncio.sleep(0.2)
        pool.kill()
        for request in (running, waiting, starting):
            with pytest.raises(ApiError, match="the server is stopping"):
                await request
        with pytest.raises(ApiError, match="the server is stopping"):
            await pool.encode(*text())

    begun = time.monotonic()
    run(pool, ask)
    assert time.monotonic() - begun < 10


def test_a_request_that_is_cancelled_leaves_no_answer_for_the_next(tiny: Path) -> None:
    here = encoder(tiny)
    pool = EncoderPool(here)

    async def ask() -> Any:
        await pool.encode(*text())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await pool.encode(*text("a" * 60_000))
        return await pool.encode(*text("import sys"))

    assert run(pool, ask) == here.encode(*text("import sys"))


def test_modules_in_the_working_folder_are_not_imported(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pickle", "psutil", "transformers", "tokenizers"):
        (tmp_path / f"{name}.py").write_text("open('imported', 'w'); raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    pool = EncoderPool(encoder(tiny))
    assert run(pool, lambda: pool.encode(*text())).prompts
    assert not (tmp_path / "imported").exists()


def test_the_loop_of_a_process(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code in this process: an encoder, then requests until the end of the input."""
    for limit in ("_limit_memory", "_limit_time"):
        monkeypatch.setattr(encoder_process, limit, lambda: None)
    here = encoder(tiny)
    messages = [here, *((Encoder.encode, text(prompt)) for prompt in ("import os", "", "a"))]
    requests = io.BytesIO(
        b"".join(encoder_process._frame(pickle.dumps(message)) for message in messages)
    )
    replies = io.BytesIO()
    run_loop(requests, replies)
    replies.seek(0)
    answers = []
    while head := replies.read(8):
        answers.append(pickle.loads(replies.read(int.from_bytes(head, "little"))))
    assert answers[0] is None
    assert answers[1] == here.encode(*text())
    assert str(answers[2]).startswith("the prompt is empty")
    assert isinstance(answers[3], Encoded)


def test_a_process_ends_when_the_server_is_gone(tiny: Path) -> None:
    pool = EncoderPool(encoder(tiny))

    async def ask() -> int:
        await pool.encode(*text())
        process = pool._text._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.close()  # as the system does for a server that was killed
        return await asyncio.wait_for(process.wait(), 5)

    assert run(pool, ask) == 0
