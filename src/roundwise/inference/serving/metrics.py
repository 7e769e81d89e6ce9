"""Counts requests for `/metrics`, with vLLM's names, and logs one line per request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from roundwise.inference.generation import Generated

#: Key of a request's record in its ASGI scope.
RECORD = "roundwise.record"
#: Longest path in the log.
MAX_PATH = 80

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

logger = logging.getLogger("roundwise.serve.requests")


@dataclass
class Record:
    """A request under way: what it was answered."""

    begun_at: float = field(default_factory=time.monotonic)
    first_token_at: float | None = None
    prompt_tokens: int = 0
    answers: list[Generated] = field(default_factory=list)
    status: int = 499
    """HTTP status; 499: the client left before there was one."""

    def add(self, item: object) -> None:
        """Notes a piece of an answer, or a whole one."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        if isinstance(item, Generated):
            self.answers.append(item)

    @property
    def generated_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(answer.tokens for answer in self.answers)


class Metrics:
    """Counts of a server, by the names that vLLM gives them.

    Args:
        model: name of the model for clients.
        running: returns the number of answers that are being generated.
        waiting: returns the number of those that wait.
    """

    def __init__(
        self, model: str, running: Callable[[], float], waiting: Callable[[], float]
    ) -> None:
        self.registry = CollectorRegistry()
        self._model = model

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets)
            return metric.labels(model)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=self.registry).labels(model)

        for name, text, value in (
            ("vllm:num_requests_running", "Answers that are being generated.", running),
            ("vllm:num_requests_waiting", "Answers that wait.", waiting),
        ):
            gauge = Gauge(name, text, ["model_name"], registry=self.registry)
            gauge.labels(model).set_function(value)
        self._prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.")
        self._generated_tokens = counter("vllm:generation_tokens", "Generated tokens.")
        self._finished = Counter(
            "vllm:request_success", "Finished answers.", ["model_name", "finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        self._first_token = histogram(
            "vllm:time_to_first_token_seconds", "Seconds until the first token.", SECONDS
        )
        self._per_token = histogram(
            "vllm:inter_token_latency_seconds", "Seconds per token after the first.", SECONDS
        )
        self._latency = histogram(
            "vllm:e2e_request_latency_seconds", "Seconds of a request, waiting included.", SECONDS
        )
        self._request_prompt = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", TOKENS
        )
        self._request_generated = histogram(
            "vllm:request_generation_tokens", "Generated tokens of a request.", TOKENS
        )

    def add(self, record: Record) -> None:
        """Counts a request that has ended; requests without any answer are not counted."""
        if record.first_token_at is None or not record.answers:
            return
        self._prompt_tokens.inc(record.prompt_tokens)
        self._generated_tokens.inc(record.generated_tokens)
        for answer in record.answers:
            reason = {"cancelled": "abort"}.get(answer.finish, answer.finish)
            self._finished.labels(self._model, reason).inc()
            if answer.tokens > 1:
                seconds = answer.seconds - answer.first_token_seconds
                self._per_token.observe(seconds / (answer.tokens - 1))
        self._first_token.observe(record.first_token_at - record.begun_at)
        self._latency.observe(time.monotonic() - record.begun_at)
        self._request_prompt.observe(record.prompt_tokens)
        self._request_generated.observe(record.generated_tokens)

    def page(self) -> bytes:
        """Returns the text for Prometheus."""
        return generate_latest(self.registry)


class RequestLog:
    """ASGI middleware: counts requests to the API, and logs a line for each when it has ended.

    Args:
        app: the application; it fills the record that it finds in the scope.
        metrics: counts.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        record = scope[RECORD] = Record()

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_noting)
        finally:
            self._metrics.add(record)
            logger.info("%s", _line(scope, record))


def _line(scope: Scope, record: Record) -> str:
    """Returns the line of a request; its path is as the client sent it, without decoded characters."""
    path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:MAX_PATH]
    now = time.monotonic()
    text = f"{scope['method']} {path} {record.status} {now - record.begun_at:.3f} s"
    if record.first_token_at is None:
        return text
    reasons = ",".join(sorted({answer.finish for answer in record.answers})) or "left"
    return (
        f"{text}, first token {record.first_token_at - record.begun_at:.3f} s, "
        f"{record.prompt_tokens} + {record.generated_tokens} tokens, {reasons}"
    )
