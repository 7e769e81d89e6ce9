"""The queue: limits of number and time; the pieces of an answer, then the whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

import roundwise as rw
from roundwise.inference.generation import Generated
from roundwise.inference.sampling import Sampling
from roundwise.inference.serving.api_errors import ApiError
from roundwise.inference.serving.engines.engine import SingleEngine
from roundwise.inference.serving.engines.queue import GenerationQueue


@pytest.fixture(scope="module")
def loaded(text_model: Path) -> tuple[Any, Any]:
    return rw.load(text_model)


async def collect(queue: GenerationQueue, sampling: Sampling, seconds: float = 60) -> list[Any]:
    return [item async for item in queue.answer([5], sampling, time.monotonic() + seconds)]


@pytest.fixture
def queue(loaded: tuple[Any, Any]) -> Iterator[GenerationQueue]:
    """A queue with room for one request."""
    engine = SingleEngine(*loaded)
    yield GenerationQueue(engine, max_requests=1)
    assert engine.close(10)


def test_pieces_come_first_then_the_whole_answer(queue: GenerationQueue) -> None:
    *pieces, answer = asyncio.run(collect(queue, Sampling(12)))
    assert isinstance(answer, Generated)
    assert (answer.tokens, answer.finish) == (12, "length")
    assert len(pieces) > 1
    assert "".join(piece.text for piece in pieces) == answer.text


def test_a_deadline_during_generation_ends_it(queue: GenerationQueue) -> None:
    answer = asyncio.run(collect(queue, Sampling(100_000), seconds=0.2))[-1]
    assert answer.finish == "cancelled"
    assert 0 < answer.tokens < 100_000


def test_a_deadline_that_passed_while_waiting(queue: GenerationQueue) -> None:
    with pytest.raises(ApiError, match="the time limit passed while this request was waiting") as e:
        asyncio.run(collect(queue, Sampling(5), seconds=-1))
    assert e.value.status == 503


def test_slots_are_limited_and_released(queue: GenerationQueue) -> None:
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


def test_who_waits_is_told_at_the_deadline_not_when_its_turn_comes(
    loaded: tuple[Any, Any],
) -> None:
    engine = SingleEngine(*loaded)
    queue = GenerationQueue(engine, max_requests=2)

    async def both() -> float:
        running = asyncio.create_task(collect(queue, Sampling(100_000), seconds=3))
        await asyncio.sleep(0.1)
        begun = time.monotonic()
        with pytest.raises(ApiError, match="the time limit passed while"):
            await collect(queue, Sampling(5), seconds=0.2)
        waited = time.monotonic() - begun
        running.cancel()
        return waited

    assert asyncio.run(both()) < 2
    assert engine.close(10)


def test_closing_the_generator_stops_the_generation(queue: GenerationQueue) -> None:
    async def leave() -> None:
        async with aclosing(queue.answer([5], Sampling(100_000), time.monotonic() + 60)) as items:
            async for _ in items:
                break

    asyncio.run(leave())
    assert queue.engine.close(5)
