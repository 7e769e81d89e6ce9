"""Measures speed: prompt and generation, latency per token, peak memory, and the kernels that ran.

Everything is measured through `model.generate`, as users call it, with random tokens as the prompt.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from roundwise.errors import ConfigError
from roundwise.inference.quant_linear import QuantLinear
from roundwise.model.build import context_length, text_config
from roundwise.system.device import peak_memory, synchronize
from roundwise.system.memory import peak_rss


@dataclass(frozen=True)
class Latency:
    """Latency in milliseconds: of the first token, and statistics of the tokens after it."""

    first_token: float
    """Median of the runs."""
    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Speed:
    """Speed of a model; speeds and latencies are medians of the runs."""

    prompt_tokens_per_second: float
    """Prompt tokens of all rows, divided by the time to the first token."""
    generation_tokens_per_second: float
    """Generated tokens of all rows after the first, divided by their time."""
    latency_ms: Latency
    peak_rss_bytes: int
    """Peak memory of this process since it started, loading included."""
    peak_device_bytes: int | None
    """Peak memory allocated by torch on the GPU during measurement; None on a CPU."""
    kernels: dict[str, int]
    """Kernel -> number of layers it computes; "torch" for linear layers that are not quantized."""
    prompt_tokens: int
    generated_tokens: int
    batch_size: int
    repetitions: int

    def as_dict(self) -> dict[str, Any]:
        """Returns the JSON of `bench --json`."""
        return asdict(self)


def speed(
    model: Any,
    *,
    prompt_tokens: int = 512,
    generated_tokens: int = 64,
    batch_size: int = 1,
    repetitions: int = 3,
    warm_up: int = 1,
    seed: int = 0,
    progress: Callable[[float], None] = lambda _: None,
) -> Speed:
    """Measures the speed of a causal language model.

    Args:
        model: transformers causal language model.
        prompt_tokens: prompt tokens of each row; random ones.
        generated_tokens: tokens to generate for each row; an end-of-text token does not end it.
        batch_size: rows that are generated together.
        repetitions: measured runs.
        warm_up: runs before them that are not measured: they prepare kernels and fill caches.
        seed: random seed of the prompt.
        progress: called with the finished part, 0 … 1.

    Raises:
        ConfigError: fewer than one prompt token, two generated ones, one row or one run; or more tokens
            than the model's context.
    """
    _check(model, prompt_tokens, generated_tokens, batch_size, repetitions)
    config = text_config(model.config)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (batch_size, prompt_tokens), generator=generator)
    ids = ids.to(model.device)
    runs: list[list[float]] = []
    for number in range(warm_up + repetitions):
        if model.device.type == "cuda" and number == warm_up:
            torch.cuda.reset_peak_memory_stats(model.device)
        times = _token_times(model, ids, generated_tokens)
        if number >= warm_up:
            runs.append(times)
        progress((number + 1) / (warm_up + repetitions))
    first = statistics.median(times[0] for times in runs)
    rest = statistics.median(times[-1] - times[0] for times in runs)
    return Speed(
        prompt_tokens_per_second=batch_size * prompt_tokens / first,
        generation_tokens_per_second=batch_size * (generated_tokens - 1) / rest,
        latency_ms=latency(runs),
        peak_rss_bytes=peak_rss(),
        peak_device_bytes=peak_memory(model.device),
        kernels=kernel_counts(model),
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        batch_size=batch_size,
        repetitions=repetitions,
    )


def latency(runs: Sequence[Sequence[float]]) -> Latency:
    """Computes latencies from token times.

    Args:
        runs: for each run, seconds from its start to each of its tokens; at least two tokens.
    """
    steps = [1e3 * (later - earlier) for run in runs for earlier, later in pairwise(run)]
    return Latency(
        first_token=1e3 * statistics.median(run[0] for run in runs),
        mean=statistics.mean(steps),
        p50=percentile(steps, 50),
        p90=percentile(steps, 90),
        p99=percentile(steps, 99),
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """Returns the value that `percent` of some values are below, or the largest one."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def kernel_counts(model: Any) -> dict[str, int]:
    """Counts the linear layers that each kernel computes; "torch" for those that are not quantized."""
    counts: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            counts[(module.kernel or module.prepare()).name] += 1
        elif isinstance(module, torch.nn.Linear):
            counts["torch"] += 1
    return dict(counts)


def _check(model: Any, prompt: int, generated: int, rows: int, runs: int) -> None:
    if min(prompt, rows, runs) < 1 or generated < 2:
        raise ConfigError(
            f"{prompt} prompt tokens, {generated} generated, {rows} rows, {runs} runs: the minimum is "
            "1, 2, 1 and 1"
        )
    limit = context_length(model)
    if limit is not None and prompt + generated > limit:
        raise ConfigError(
            f"{prompt} prompt and {generated} generated tokens are more than the model's context of "
            f"{limit} tokens"
        )


def _token_times(model: Any, ids: torch.Tensor, tokens: int) -> list[float]:
    """Generates `tokens` tokens; returns the seconds from the start to each of them."""
    clock = _TokenClock(ids.device)
    start = time.perf_counter()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return [moment - start for moment in clock.times]


class _TokenClock(StoppingCriteria):  # type: ignore[misc]  # untyped there
    """Stopping criterion that stops nothing: `generate` calls it after each token, it notes the time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, list[float]()

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        synchronize(self.device)  # until now the device's work is only queued
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
