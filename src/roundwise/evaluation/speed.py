"""How fast a model is: prompt and generation, latency per token, memory, and which kernels ran.

Everything is measured through `model.generate`, as users run it, with random tokens as the prompt.
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
from roundwise.system.device import peak_memory, synchronize
from roundwise.system.memory import peak_rss


@dataclass(frozen=True)
class Latency:
    """Milliseconds: to the first token (median of the runs), and per token after it."""

    first_token: float
    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Speed:
    """Medians over the runs."""

    prompt_tokens_per_second: float
    """Tokens of all prompts over the time to the first token."""
    generation_tokens_per_second: float
    """Tokens of all rows after the first, over their time."""
    latency_ms: Latency
    peak_rss_bytes: int
    """Of this process since it began, loading included."""
    peak_device_bytes: int | None
    """Allocated by torch on a GPU while measuring; None on a CPU."""
    kernels: dict[str, int]
    """How many layers each kernel computes; "torch" are linear layers that are not quantized."""
    prompt_tokens: int
    generated_tokens: int
    batch_size: int
    repetitions: int

    def as_dict(self) -> dict[str, Any]:
        """As `bench --json` prints it."""
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
    """Measures a causal language model.

    Args:
        model: transformers model.
        prompt_tokens: of each row; random ones.
        generated_tokens: of each row, exactly: an end-of-text token does not end it.
        batch_size: rows that are generated together.
        repetitions: measured runs.
        warm_up: runs before them, not measured: kernels are prepared, caches filled.
        seed: of the prompt.
        progress: called with the finished part, 0 … 1.

    Raises:
        ConfigError: fewer than one prompt token, two generated ones, one row or one run; more tokens
            than the model was made for.
    """
    _check(model, prompt_tokens, generated_tokens, batch_size, repetitions)
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (batch_size, prompt_tokens), generator=generator)
    ids = ids.to(model.device)
    runs: list[list[float]] = []
    for number in range(warm_up + repetitions):
        if model.device.type == "cuda" and number == warm_up:
            torch.cuda.reset_peak_memory_stats(model.device)
        stamps = _stamps(model, ids, generated_tokens)
        if number >= warm_up:
            runs.append(stamps)
        progress((number + 1) / (warm_up + repetitions))
    first = statistics.median(stamps[0] for stamps in runs)
    rest = statistics.median(stamps[-1] - stamps[0] for stamps in runs)
    return Speed(
        prompt_tokens_per_second=batch_size * prompt_tokens / first,
        generation_tokens_per_second=batch_size * (generated_tokens - 1) / rest,
        latency_ms=latency(runs),
        peak_rss_bytes=peak_rss(),
        peak_device_bytes=peak_memory(model.device),
        kernels=kernels(model),
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        batch_size=batch_size,
        repetitions=repetitions,
    )


def latency(runs: Sequence[Sequence[float]]) -> Latency:
    """From the times of each token since the begin of its run, in seconds."""
    steps = sorted(1e3 * (b - a) for run in runs for a, b in pairwise(run))
    at = {part: steps[min(len(steps) - 1, len(steps) * part // 100)] for part in (50, 90, 99)}
    return Latency(
        1e3 * statistics.median(run[0] for run in runs),
        statistics.mean(steps), at[50], at[90], at[99],
    )  # fmt: skip


def kernels(model: Any) -> dict[str, int]:
    """How many linear layers each kernel computes; "torch" for those that are not quantized."""
    found: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            found[(module.kernel or module.prepare()).name] += 1
        elif isinstance(module, torch.nn.Linear):
            found["torch"] += 1
    return dict(found)


def _check(model: Any, prompt: int, generated: int, rows: int, runs: int) -> None:
    if min(prompt, rows, runs) < 1 or generated < 2:
        raise ConfigError(
            f"{prompt} prompt tokens, {generated} generated, {rows} rows, {runs} runs: at least 1, "
            "2, 1 and 1 are needed"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt + generated > limit:
        raise ConfigError(
            f"{prompt} prompt and {generated} generated tokens are more than the {limit} that the "
            "model was made for"
        )


def _stamps(model: Any, ids: torch.Tensor, tokens: int) -> list[float]:
    """Seconds from the begin of one generation to each of its tokens."""
    watch = _Clock(ids.device)
    begun = time.perf_counter()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([watch]),
    )
    return [stamp - begun for stamp in watch.stamps]


class _Clock(StoppingCriteria):  # type: ignore[misc]  # untyped there
    """Called by `generate` after each token; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stamps = device, list[float]()

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        synchronize(self.device)  # its work is only queued when Python gets here
        self.stamps.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
