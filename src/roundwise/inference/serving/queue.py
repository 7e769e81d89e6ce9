"""Queue of generations: one model, one generation at a time, in the order of arrival."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from roundwise.inference.generation import Generated, Sampling, generate
from roundwise.inference.serving.protocol import ApiError

T = TypeVar("T")


class GenerationQueue:
    """Runs `generate` in its own thread and returns the text in pieces.

    Args:
        model: transformers causal language model.
        tokenizer: its tokenizer.
        max_requests: most requests that may run and wait at the same time; more are refused.
    """

    def __init__(self, model: Any, tokenizer: Any, max_requests: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_requests = max_requests
        self.open_requests = 0
        """Requests that run or wait."""
        self._closing = threading.Event()
        # A single thread: the model runs one generation at a time, and random seeds do not interfere.
        self._generation_thread = ThreadPoolExecutor(1, thread_name_prefix="roundwise-generate")
        # A thread of its own, so that encoding a long text does not delay other answers.
        self._tokenizer_thread = ThreadPoolExecutor(1, thread_name_prefix="roundwise-encode")

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Context manager: occupies one of the `max_requests` slots.

        Raises:
            ApiError: all slots are occupied; the status makes clients retry later.
        """
        if self.open_requests >= self.max_requests:
            raise ApiError(
                429,
                f"the server is at its limit of {self.max_requests} running and waiting requests: "
                "try again later",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
            )
        self.open_requests += 1
        try:
            yield
        finally:
            self.open_requests -= 1

    async def encode(self, work: Callable[[], T]) -> T:
        """Runs a function in the tokenizer's thread: tokenizers are not thread-safe."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizer_thread, work)

    async def answer(
        self, ids: list[int], sampling: Sampling, deadline: float
    ) -> AsyncGenerator[str | Generated]:
        """Yields pieces of text, then the whole answer. Closing the generator stops the generation.

        Args:
            ids: token ids of the prompt.
            sampling: sampling parameters.
            deadline: time (time.monotonic) at which the generation ends with the text so far.

        Raises:
            ApiError: the deadline passed before the generation started.
            Exception: whatever the model raised.
        """
        loop, stopped = asyncio.get_running_loop(), threading.Event()
        items: asyncio.Queue[str | Generated | Exception] = asyncio.Queue()

        def send(item: str | Generated | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(items.put_nowait, item)

        def must_stop() -> bool:
            return stopped.is_set() or self._closing.is_set() or time.monotonic() > deadline

        def run() -> None:
            try:
                if must_stop():
                    raise _timeout_error()
                send(
                    generate(
                        self.model, self.tokenizer, ids, sampling, on_text=send, cancelled=must_stop
                    )
                )
            except Exception as error:  # any error of the model ends this request, not the server
                send(error)

        future = self._generation_thread.submit(run)
        try:
            while True:
                item = await items.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, Generated):
                    return
        finally:
            stopped.set()
            future.cancel()

    def close(self) -> None:
        """Stops the running generation at its next token, and waits for it."""
        self._closing.set()
        self._tokenizer_thread.shutdown(wait=False, cancel_futures=True)
        self._generation_thread.shutdown(wait=True, cancel_futures=True)


def _timeout_error() -> ApiError:
    return ApiError(
        503, "the server is busy: the time limit passed while this request was waiting",
        kind="server_error", code="timeout",
    )  # fmt: skip
