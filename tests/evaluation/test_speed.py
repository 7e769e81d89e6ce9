"""Speed: exact arithmetic on given times, and plausible values of a real model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import roundwise as rw
from roundwise.errors import ConfigError
from roundwise.evaluation import speed as module
from roundwise.evaluation.speed import kernel_counts, latency, speed


@pytest.fixture(scope="module")
def model(quantized: Callable[..., Path]) -> Any:
    return rw.load(quantized("llama"))[0]


def test_a_model(model: Any) -> None:
    progress: list[float] = []
    result = speed(
        model, prompt_tokens=6, generated_tokens=5, batch_size=2, repetitions=2,
        progress=progress.append,
    )  # fmt: skip
    assert progress == [1 / 3, 2 / 3, 1.0]
    times = result.latency_ms
    assert 0 < times.p50 <= times.p90 <= times.p99
    assert times.first_token > 0
    assert result.prompt_tokens_per_second == pytest.approx(2 * 6 / (times.first_token / 1e3))
    assert result.generation_tokens_per_second > 0
    assert result.peak_rss_bytes > 10_000_000
    assert result.peak_device_bytes is None
    assert result.kernels == kernel_counts(model)
    assert result.as_dict()["latency_ms"]["p50"] == times.p50


def test_the_arithmetic(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A first run that warms up, then two: 1 s for the prompt, then 0.1 and 0.3 s per token.
    runs = iter([[9.0, 9.1, 9.2], [1.0, 1.1, 1.2], [1.0, 1.3, 1.6]])
    monkeypatch.setattr(module, "_token_times", lambda *_: next(runs))
    result = speed(
        model, prompt_tokens=100, generated_tokens=3, batch_size=4, repetitions=2
    )  # fmt: skip
    assert result.prompt_tokens_per_second == pytest.approx(400)
    assert result.generation_tokens_per_second == pytest.approx(4 * 2 / 0.4)
    assert result.latency_ms.first_token == pytest.approx(1000)
    assert result.latency_ms.mean == pytest.approx(200)


def test_percentiles() -> None:
    # Steps of 1 … 100 ms.
    times = [0.5]
    for step in range(100, 0, -1):
        times.append(times[-1] + step / 1000)
    result = latency([times])
    assert (result.p50, result.p90, result.p99) == pytest.approx((51, 91, 100))
    assert result.first_token == pytest.approx(500)


def test_kernels_are_counted(model: Any, llama: Path) -> None:
    layers = 7 * model.config.num_hidden_layers
    counts = kernel_counts(model)
    assert counts.pop("torch") == 1  # the head
    assert sum(counts.values()) == layers
    assert kernel_counts(rw.load(llama)[0]) == {"torch": layers + 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 0}, "0 prompt tokens"),
        ({"generated_tokens": 1}, "1 generated"),
        ({"batch_size": 0}, "0 rows"),
        ({"repetitions": 0}, "0 runs"),
        ({"prompt_tokens": 10_000_000}, "more than the model's context"),
    ],
)
def test_impossible_settings_are_refused(model: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        speed(model, **options)
