"""Measures a server under load: throughput and latencies with several requests at the same time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, NamedTuple

from roundwise.errors import ConfigError, RoundwiseError, RunError
from roundwise.evaluation.endpoint.client import Endpoint, Refused
from roundwise.evaluation.speed import percentile

#: Token ids of random prompts if the vocabulary is not known: every vocabulary has them.
KNOWN_TOKENS = range(100, 1000)


class Spread(NamedTuple):
    """Two percentiles of a time."""

    p50: float
    p99: float


@dataclass(frozen=True)
class LoadResult:
    """Throughput and latencies of a server with some number of requests at the same time."""

    concurrency: int
    """Requests at the same time."""
    requests: int
    """Requests that were answered."""
    failed: int
    error: str | None
    """The most frequent error; None: no request failed."""
    seconds: float
    """Time of all requests together."""
    prompt_tokens: int
    """Tokens of each prompt."""
    generated_tokens: int
    """Tokens of all answers together."""
    generation_tokens_per_second: float
    """Generated tokens of all requests, divided by the time of all together."""
    first_token_ms: Spread | None
    """Time from a request to its first token; None: every request failed, as for the next ones."""
    per_token_ms: Spread | None
    """Mean time of the other tokens of an answer."""
    request_seconds: Spread | None
    """Time of a whole request."""

    def as_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        spreads = ("first_token_ms", "per_token_ms", "request_seconds")
        return asdict(self) | {
            name: value and value._asdict() for name in spreads for value in [getattr(self, name)]
        }


@dataclass(frozen=True)
class Answered:
    """Times of a request, in seconds from when it was sent, and the number of its tokens."""

    first: float
    """The first token."""
    last: float
    """The last token."""
    end: float
    tokens: int


@dataclass(frozen=True)
class Load:
    """The requests to send."""

    prompt_tokens: int = 512
    generated_tokens: int = 64
    repetitions: int = 3
    """Requests that each client sends, one after another."""
    tokens: Sequence[int] = KNOWN_TOKENS
    """Token ids that random prompts are made of."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.repetitions) < 1 or self.generated_tokens < 2:
            raise ConfigError(
                f"{self.prompt_tokens} prompt tokens, {self.generated_tokens} generated, "
                f"{self.repetitions} requests of each client: the minimum is 1, 2 and 1"
            )


def measure_load(
    endpoint: Endpoint,
    load: Load,
    concurrencies: Sequence[int],
    progress: Callable[[str, float], None] = lambda _what, _done: None,
) -> list[LoadResult]:
    """Measures a server with several numbers of requests at the same time.

    Args:
        endpoint: the server.
        load: the requests.
        concurrencies: numbers of requests at the same time.
        progress: called with the current step and the finished part of it, 0 … 1.

    Raises:
        ConfigError: prompt and answer are longer than the server's context.
        RunError: the server does not answer a single request.
    """
    length = load.prompt_tokens + load.generated_tokens
    if endpoint.context is not None and length > endpoint.context:
        raise ConfigError(
            f"{load.prompt_tokens} prompt and {load.generated_tokens} generated tokens are more than "
            f"the server's context of {endpoint.context} tokens"
        )
    random = Random(load.seed)
    progress("warming up", 0.0)
    client = Client(endpoint, load)
    client.ask(_prompt(random, load))  # fails here if the server answers nothing
    results = []
    for concurrency in concurrencies:
        count = concurrency * load.repetitions
        prompts = [_prompt(random, load) for _ in range(count)]
        name = f"{concurrency} at a time"
        outcomes: list[Answered | str] = []
        begun = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as pool:
            for outcome in pool.map(client.try_to_ask, prompts):
                outcomes.append(outcome)
                progress(name, len(outcomes) / count)
        results.append(summarize(concurrency, load, outcomes, time.perf_counter() - begun))
    return results


class Client:
    """Sends requests of a load, with `ignore_eos` if the server knows it (vLLM, llama.cpp)."""

    def __init__(self, endpoint: Endpoint, load: Load) -> None:
        self._endpoint, self._load = endpoint, load
        self._extra: dict[str, Any] = {"ignore_eos": True}

    def ask(self, prompt: list[int]) -> Answered:
        """Sends a prompt and reads the stream of its answer.

        Raises:
            RunError: the server refuses it or fails.
        """
        try:
            return self._stream(prompt)
        except Refused as error:
            if error.status not in (400, 422) or not self._extra:
                raise
            self._extra = {}
            return self._stream(prompt)

    def try_to_ask(self, prompt: list[int]) -> Answered | str:
        """Returns the times of a request, or the message of its error."""
        try:
            return self.ask(prompt)
        except RoundwiseError as error:
            return str(error)

    def _stream(self, prompt: list[int]) -> Answered:
        body = {
            "prompt": prompt, "max_tokens": self._load.generated_tokens, "temperature": 0,
            "stream_options": {"include_usage": True}, **self._extra,
        }  # fmt: skip
        begun = time.perf_counter()
        times: list[float] = []
        counted: int | None = None
        for event in self._endpoint.stream("/v1/completions", body):
            choices = event.get("choices") or []
            if any(choice.get("text") for choice in choices):
                times.append(time.perf_counter() - begun)
            usage = event.get("usage")
            if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
                counted = usage["completion_tokens"]
        end = time.perf_counter() - begun
        # Tokens without a text, such as parts of a character, have no event of their own.
        tokens = len(times) if counted is None else counted
        if not tokens:
            raise RunError(f"{self._endpoint.url} answered without a token")
        return Answered(times[0] if times else end, times[-1] if times else end, end, tokens)


def summarize(
    concurrency: int, load: Load, outcomes: Sequence[Answered | str], seconds: float
) -> LoadResult:
    """Returns throughput and percentiles of some requests.

    Args:
        concurrency: requests at the same time.
        load: the requests.
        outcomes: times of each request, or the message of its error.
        seconds: time of all requests together.
    """
    answered = [outcome for outcome in outcomes if isinstance(outcome, Answered)]
    errors = Counter(outcome for outcome in outcomes if isinstance(outcome, str))
    tokens = sum(each.tokens for each in answered)
    return LoadResult(
        concurrency=concurrency,
        requests=len(answered),
        failed=errors.total(),
        error=errors.most_common(1)[0][0] if errors else None,
        seconds=seconds,
        prompt_tokens=load.prompt_tokens,
        generated_tokens=tokens,
        generation_tokens_per_second=tokens / seconds,
        first_token_ms=_spread([1e3 * each.first for each in answered]),
        per_token_ms=_spread(
            [
                1e3 * (each.last - each.first) / (each.tokens - 1)
                for each in answered
                if each.tokens > 1
            ]
        ),
        request_seconds=_spread([each.end for each in answered]),
    )


def _spread(values: list[float]) -> Spread | None:
    return Spread(percentile(values, 50), percentile(values, 99)) if values else None


def _prompt(random: Random, load: Load) -> list[int]:
    """Returns a random prompt: none is a prompt that the server has computed before."""
    return [random.choice(load.tokens) for _ in range(load.prompt_tokens)]
