"""Queue of generations: one model, one generation at a time, in the order of arrival."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from roundwise.inference.generation import Generated, generate
from roundwise.inference.sampling import Sampling
from roundwise.inference.serving.protocol import busy_error, stopping_error, timeout_error


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
        # A single thread: the model runs one generation at a time, and in order.
        self._generation_thread = ThreadPoolExecutor(1, thread_name_prefix="roundwise-generate")

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Context manager: occupies one of the `max_requests` slots.

        Raises:
            ApiError: all slots are occupied; the status makes clients retry later.
        """
        if self.open_requests >= self.max_requests:
            raise busy_error(
                f"the server is at its limit of {self.max_requests} running and waiting requests"
            )
        self.open_requests += 1
        try:
            yield
        finally:
            self.open_requests -= 1

    async def answer(
        self, ids: Sequence[int], sampling: Sampling, deadline: float
    ) -> AsyncGenerator[str | Generated]:
        """Yields pieces of text, then the whole answer. Closing the generator stops the generation.

        Args:
            ids: token ids of the prompt.
            sampling: sampling parameters.
            deadline: time (time.monotonic) at which the generation ends with the text so far.

        Raises:
            ApiError: the deadline passed, or the server stopped, before the generation started.
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
                if self._closing.is_set():
                    raise stopping_error()
                if must_stop():
                    raise timeout_error()
                send(
                    generate(
                        self.model, self.tokenizer, list(ids), sampling, on_text=send,
                        cancelled=must_stop,
                    )
                )  # fmt: skip
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

    def stop(self) -> None:
        """Ends the running generation at its next token; those that wait fail."""
        self._closing.set()

    def close(self) -> None:
        """Stops, and waits for the running generation."""
        self.stop()
        self._generation_thread.shutdown(wait=True, cancel_futures=True)
