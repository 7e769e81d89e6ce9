"""Counts with vLLM's names, and one line of log per request."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from roundwise.inference.generation import Generated
from roundwise.inference.serving.metrics import RECORD, Metrics, RequestLog


def values(metrics: Metrics) -> dict[str, float]:
    """Samples of the page by name; those with a reason by name and reason."""
    families = text_string_to_metric_families(metrics.page().decode())
    samples = [sample for family in families for sample in family.samples]
    assert all(sample.labels["model_name"] == "m" for sample in samples)
    return {
        sample.name + sample.labels.get("finished_reason", ""): sample.value
        for sample in samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def handle(metrics: Metrics, app: Any, path: str = "/v1/completions") -> None:
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode()}

    async def send(_: Any) -> None:
        pass

    asyncio.run(RequestLog(app, metrics=metrics)(scope, None, send))


async def answering(scope: Any, _receive: Any, send: Any) -> None:
    """An application that answers 5 prompt tokens with two answers of 1 and 11 tokens."""
    record = scope[RECORD]
    record.prompt_tokens = 5
    record.add("a piece")
    record.add(Generated("a", 5, 1, "stop", 0.1, 0.1))
    record.add(Generated("b", 5, 11, "cancelled", 0.1, 2.1))
    await send({"type": "http.response.start", "status": 200})


async def refusing(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 400})


def test_counts_have_the_names_of_vllm() -> None:
    metrics = Metrics("m", lambda: 3, lambda: 4)
    handle(metrics, answering)
    handle(metrics, answering)
    handle(metrics, refusing)
    found = values(metrics)
    assert found["vllm:num_requests_running"] == 3
    assert found["vllm:num_requests_waiting"] == 4
    assert found["vllm:prompt_tokens_total"] == 10
    assert found["vllm:generation_tokens_total"] == 24
    assert found["vllm:request_success_totalstop"] == 2
    assert found["vllm:request_success_totalabort"] == 2
    assert found["vllm:inter_token_latency_seconds_sum"] == pytest.approx(2 * 0.2)
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds",
                 "request_prompt_tokens", "request_generation_tokens"):  # fmt: skip
        assert found[f"vllm:{name}_count"] == 2


def test_a_line_per_request(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics("m", lambda: 0, lambda: 0)
    with caplog.at_level(logging.INFO):
        handle(metrics, answering)
        handle(metrics, refusing, "/v1/" + "x" * 500)
        handle(metrics, refusing, "/health")
    one, other = (record.getMessage() for record in caplog.records)
    assert one.startswith("POST /v1/completions 200 0.0")
    assert one.endswith(" s, 5 + 12 tokens, cancelled,stop")
    assert other.startswith("POST /v1/xxx")
    assert len(other) < 120


def test_a_client_that_leaves_is_a_line_too(caplog: pytest.LogCaptureFixture) -> None:
    async def leaving(scope: Any, _receive: Any, _send: Any) -> None:
        scope[RECORD].add("a piece")

    async def failing(*_: Any) -> None:
        raise TimeoutError

    metrics = Metrics("m", lambda: 0, lambda: 0)
    with caplog.at_level(logging.INFO):
        handle(metrics, leaving)
        with pytest.raises(TimeoutError):
            handle(metrics, failing)
    one, other = (record.getMessage() for record in caplog.records)
    assert " 499 " in one
    assert one.endswith("0 + 0 tokens, left")
    assert " 499 " in other
    assert values(metrics)["vllm:prompt_tokens_total"] == 0
