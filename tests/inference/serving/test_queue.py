"""The queue: one generation at a time, in order, within limits of number and time."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

import roundwise as rw
from roundwise.inference.generation import Generated, Sampling
from roundwise.inference.serving import queue as queue_module
from roundwise.inference.serving.protocol import ApiError
from roundwise.inference.serving.queue import GenerationQueue


@pytest.fixture(scope="module")
def loaded(text_model: Path) -> tuple[Any, Any]:
    return rw.load(text_model)


async def collect(queue: GenerationQueue, sampling: Sampling, seconds: float = 60) -> list[Any]:
    return [item async for item in queue.answer([5], sampling, time.monotonic() + seconds)]


def test_pieces_come_first_then_the_whole_answer(loaded: tuple[Any, Any]) -> None:
    queue = GenerationQueue(*loaded, max_requests=1)
    *pieces, answer = asyncio.run(collect(queue, Sampling(12)))
    queue.close()
    assert isinstance(answer, Generated)
    assert (answer.tokens, answer.finish) == (12, "length")
    assert len(pieces) > 1
    assert "".join(pieces) == answer.text


def test_generations_run_in_the_order_of_arrival(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, log = [], []

    def generate(_model: Any, _tokenizer: Any, _ids: Any, sampling: Sampling, **_: Any) -> Any:
        running.append(sampling.max_new_tokens)
        assert len(running) == 1
        time.sleep(0.02)
        log.append(running.pop())
        return Generated("", 1, 1, "stop", 0.1, 0.1)

    monkeypatch.setattr(queue_module, "generate", generate)
    queue = GenerationQueue(*loaded, max_requests=4)

    async def all_of_them() -> None:
        await asyncio.gather(*(collect(queue, Sampling(n)) for n in (3, 1, 2)))

    asyncio.run(all_of_them())
    queue.close()
    assert log == [3, 1, 2]


def test_a_deadline_during_generation_ends_it(loaded: tuple[Any, Any]) -> None:
    queue = GenerationQueue(*loaded, max_requests=1)
    answer = asyncio.run(collect(queue, Sampling(100_000), seconds=0.2))[-1]
    queue.close()
    assert answer.finish == "cancelled"
    assert 0 < answer.tokens < 100_000


def test_a_deadline_that_passed_while_waiting(loaded: tuple[Any, Any]) -> None:
    queue = GenerationQueue(*loaded, max_requests=1)
    with pytest.raises(ApiError, match="the time limit passed while this request was waiting") as e:
        asyncio.run(collect(queue, Sampling(5), seconds=-1))
    assert e.value.status == 503
    queue.close()


def test_errors_of_the_model_are_raised(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(queue_module, "generate", generate)
    queue = GenerationQueue(*loaded, max_requests=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(collect(queue, Sampling(5)))
    queue.close()


def test_slots_are_limited_and_released(loaded: tuple[Any, Any]) -> None:
    queue = GenerationQueue(*loaded, max_requests=1)
    with (
        queue.slot(),
        pytest.raises(ApiError, match="limit of 1 running and waiting requests") as e,
        queue.slot(),
    ):
        pass
    assert e.value.status == 429
    with queue.slot():
        assert queue.open_requests == 1
    assert queue.open_requests == 0
    queue.close()


def test_when_it_stops_the_running_generation_returns_what_it_has_and_others_fail(
    loaded: tuple[Any, Any],
) -> None:
    queue = GenerationQueue(*loaded, max_requests=3)

    async def all_of_them() -> list[Any]:
        tasks = [asyncio.create_task(collect(queue, Sampling(100_000))) for _ in range(3)]
        await asyncio.sleep(0.3)
        queue.stop()
        return await asyncio.gather(*tasks, return_exceptions=True)

    running, *waiting = asyncio.run(all_of_them())
    queue.close()
    assert running[-1].finish == "cancelled"
    assert running[-1].tokens > 1
    assert "".join(running[:-1]) == running[-1].text
    for error in waiting:
        assert isinstance(error, ApiError)
        assert (error.status, str(error)) == (503, "the server is stopping")
