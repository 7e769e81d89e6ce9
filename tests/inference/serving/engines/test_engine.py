"""One generation at a time: order, errors, the prompt with `echo`, and an end that does not wait."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import roundwise as rw
from roundwise.inference.generation import Generated
from roundwise.inference.prompt_logprobs import prompt_logprobs
from roundwise.inference.sampling import Sampling
from roundwise.inference.serving.api_errors import ApiError
from roundwise.inference.serving.engines import engine as engine_module
from roundwise.inference.serving.engines.engine import Item, SingleEngine, Task
from roundwise.inference.serving.engines.queue import GenerationQueue
from roundwise.inference.serving.responses import Piece


@pytest.fixture(scope="module")
def loaded(text_model: Path) -> tuple[Any, Any]:
    return rw.load(text_model)


async def collect(queue: GenerationQueue, sampling: Sampling, **options: Any) -> list[Any]:
    ids = options.pop("ids", [5])
    return [x async for x in queue.answer(ids, sampling, time.monotonic() + 60, **options)]


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

    monkeypatch.setattr(engine_module, "generate", generate)
    engine = SingleEngine(*loaded)
    queue = GenerationQueue(engine, max_requests=4)

    async def all_of_them() -> None:
        await asyncio.gather(*(collect(queue, Sampling(n)) for n in (3, 1, 2)))

    asyncio.run(all_of_them())
    assert engine.close(10)
    assert log == [3, 1, 2]


def test_errors_of_the_model_are_raised(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine_module, "generate", generate)
    engine = SingleEngine(*loaded)
    queue = GenerationQueue(engine, max_requests=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(collect(queue, Sampling(5)))
    assert engine.close(10)


def test_when_it_stops_the_running_generation_returns_what_it_has_and_others_fail(
    loaded: tuple[Any, Any],
) -> None:
    engine = SingleEngine(*loaded)
    queue = GenerationQueue(engine, max_requests=3)

    async def all_of_them() -> list[Any]:
        tasks = [asyncio.create_task(collect(queue, Sampling(100_000))) for _ in range(3)]
        await asyncio.sleep(0.3)
        engine.stop()
        return await asyncio.gather(*tasks, return_exceptions=True)

    running, *waiting = asyncio.run(all_of_them())
    assert engine.close(10)
    assert running[-1].finish == "cancelled"
    assert running[-1].tokens > 1
    assert "".join(piece.text for piece in running[:-1]) == running[-1].text
    for error in waiting:
        assert isinstance(error, ApiError)
        assert (error.status, str(error)) == (503, "the server is stopping")


@pytest.mark.parametrize("max_new_tokens", [0, 4])
def test_echo_sends_the_prompt_first(max_new_tokens: int, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    engine = SingleEngine(model, tokenizer)
    ids = tokenizer("import os, sys")["input_ids"]
    sampling = Sampling(max_new_tokens, logprobs=2)
    prompt, *pieces, answer = asyncio.run(
        collect(GenerationQueue(engine, 1), sampling, ids=ids, echo=True)
    )
    assert engine.close(10)
    assert prompt.text == "import os, sys"
    assert list(prompt.logprobs) == prompt_logprobs(
        model, ids, 2, lambda token: tokenizer.decode([token])
    )
    assert (answer.tokens, answer.prompt_tokens) == (max_new_tokens, len(ids))
    assert sum(len(piece.logprobs) for piece in pieces) == max_new_tokens
    assert "".join(piece.text for piece in pieces) == answer.text


def test_echo_without_log_probabilities(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    engine = SingleEngine(model, tokenizer)
    ids = tokenizer("import os")["input_ids"]
    items = asyncio.run(collect(GenerationQueue(engine, 1), Sampling(0), ids=ids, echo=True))
    assert engine.close(10)
    assert items[0] == Piece("import os")
    assert isinstance(items[1], Generated)


def test_a_computation_that_cannot_be_stopped_does_not_keep_the_process(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def generate(*_: Any, **__: Any) -> Any:
        release.wait(30)
        raise RuntimeError

    monkeypatch.setattr(engine_module, "generate", generate)
    engine = SingleEngine(*loaded)
    items: list[Item] = []
    engine.submit(Task([5], Sampling(1), False, time.monotonic() + 60, items.append))
    begun = time.monotonic()
    assert not engine.close(0.2)
    assert time.monotonic() - begun < 5
    late = Task([5], Sampling(1), False, time.monotonic() + 60, items.append)
    engine.submit(late)
    assert isinstance(items[0], ApiError)
    release.set()
