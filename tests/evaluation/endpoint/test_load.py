"""A server under load: exact arithmetic on given times, and the requests that are sent."""

from __future__ import annotations

from typing import Any

import pytest

from roundwise.errors import ConfigError, RunError
from roundwise.evaluation.endpoint.client import Endpoint
from roundwise.evaluation.endpoint.load import Answered, Load, measure_load, summarize
from tests.evaluation.endpoint.servers import Double, serving


def double(form: str = "vllm", **options: Any) -> Double:
    return Double(None, None, form, **options)


def test_the_arithmetic() -> None:
    outcomes = [Answered(0.5, 2.5, 2.75, 11), Answered(1.0, 2.0, 2.0, 5), "full", "full", "other"]
    result = summarize(2, Load(prompt_tokens=7), outcomes, seconds=4.0)
    assert (result.concurrency, result.requests, result.failed, result.error) == (2, 2, 3, "full")
    assert (result.prompt_tokens, result.generated_tokens) == (7, 16)
    assert result.generation_tokens_per_second == pytest.approx(4.0)
    assert result.first_token_ms == pytest.approx((1000, 1000))
    assert result.per_token_ms == pytest.approx((250, 250))  # 2 s for 10 tokens, 1 s for 4
    assert result.request_seconds == pytest.approx((2.75, 2.75))
    assert result.as_dict()["first_token_ms"] == {"p50": 1000, "p99": 1000}


def test_percentiles_over_many() -> None:
    outcomes = [Answered(n / 1000, 1.0, 1.0, 2) for n in range(1, 201)]
    spread = summarize(1, Load(), outcomes, 1.0).first_token_ms
    assert spread == pytest.approx((101, 199))


def test_nothing_was_answered() -> None:
    result = summarize(4, Load(), ["full"] * 4, 1.0)
    assert (result.requests, result.first_token_ms) == (0, None)
    assert result.as_dict()["per_token_ms"] is None


@pytest.mark.parametrize("form", ["vllm", "openai"])
def test_a_server(form: str) -> None:
    load = Load(prompt_tokens=5, generated_tokens=4, repetitions=2, tokens=range(10, 20))
    steps: list[tuple[str, float]] = []
    with serving(double(form, seconds_per_token=0.02)) as server:
        results = measure_load(
            Endpoint(server.url), load, [1, 4], progress=lambda *step: steps.append(step)
        )
    assert [(each.concurrency, each.requests) for each in results] == [(1, 2), (4, 8)]
    for each in results:
        assert each.generated_tokens == 4 * each.requests
        assert each.failed == 0
        assert each.first_token_ms is not None
        assert each.per_token_ms is not None
        assert each.first_token_ms.p50 >= 20
        assert each.per_token_ms.p50 >= 20
    # Four at a time are faster together than one after another.
    one, four = (each.generation_tokens_per_second for each in results)
    assert four > 1.5 * one
    bodies = [body for _, body in server.bodies]
    refused = form == "openai"  # it does not know ignore_eos
    assert [("ignore_eos" in body) for body in bodies] == (
        [True] + [False] * 11 if refused else [True] * 11
    )
    prompts = [tuple(body["prompt"]) for body in bodies[refused:]]
    assert len({*prompts}) == len(prompts) == 11
    assert all(10 <= token < 20 for prompt in prompts for token in prompt)
    assert all(body["max_tokens"] == 4 for body in bodies)
    assert steps[0] == ("warming up", 0.0)
    assert steps[-1] == ("4 at a time", 1.0)


def test_requests_that_fail_are_counted() -> None:
    load = Load(prompt_tokens=5, generated_tokens=2, repetitions=4)
    with serving(double(fail_after=3)) as server:
        [result] = measure_load(Endpoint(server.url), load, [1])
    assert (result.requests, result.failed) == (2, 2)
    assert result.error is not None
    assert "out of memory" in result.error


def test_a_server_that_answers_nothing() -> None:
    with (
        serving(double(fail_after=0)) as server,
        pytest.raises(RunError, match="out of memory"),
    ):
        measure_load(Endpoint(server.url), Load(5, 2, 1), [1])


def test_longer_than_the_context() -> None:
    with (
        serving(double()) as server,
        pytest.raises(ConfigError, match="more than the server's context of 512 tokens"),
    ):
        measure_load(Endpoint(server.url), Load(500, 13, 1), [1])


@pytest.mark.parametrize("sizes", [(0, 2, 1), (1, 1, 1), (1, 2, 0)])
def test_impossible_loads(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="the minimum is 1, 2 and 1"):
        Load(*sizes)
