"""Queue of requests: a limited number, each with a time limit, whose answers come in pieces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager

from roundwise.inference.generation import Generated
from roundwise.inference.sampling import Sampling
from roundwise.inference.serving.api_errors import busy_error, timeout_error
from roundwise.inference.serving.engines.engine import Engine, Item, Task
from roundwise.inference.serving.responses import Piece


class GenerationQueue:
    """Passes requests to an engine and returns their text in pieces.

    Args:
        engine: generates the answers.
        max_requests: most requests that may run and wait at the same time; more are refused.
    """

    def __init__(self, engine: Engine, max_requests: int) -> None:
        self.engine, self.max_requests = engine, max_requests
        self.open_requests = 0
        """Requests that run or wait."""
        self._tasks: set[Task] = set()

    def count(self, started: bool) -> int:
        """Returns the number of answers that are being generated, or that wait."""
        return sum(task.started == started for task in self._tasks)

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
        self,
        ids: Sequence[int],
        sampling: Sampling,
        deadline: float,
        *,
        echo: bool = False,
        at_once: bool = False,
    ) -> AsyncGenerator[Piece | Generated]:
        """Yields pieces of text, then the whole answer. Closing the generator stops the generation.

        Args:
            ids: token ids of the prompt.
            sampling: sampling parameters.
            deadline: time (time.monotonic) at which the generation ends with the text so far.
            echo: yield the prompt first.
            at_once: after the first piece, yield the others only when the answer is complete; the event
                loop has less to do.

        Raises:
            ApiError: the deadline passed, or the server stopped, before the generation started.
            Exception: whatever the model raised.
        """
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[Item] = asyncio.Queue()
        held: list[Item] = []

        def put(ready: list[Item]) -> None:
            for item in ready:
                items.put_nowait(item)

        def send(item: Item) -> None:  # called by the thread of the engine
            held.append(item)
            if at_once and isinstance(item, Piece) and len(held) + task.sent > 1:
                return
            task.sent += len(held)
            if not loop.is_closed():
                loop.call_soon_threadsafe(put, held[:])
            held.clear()

        task = Task(list(ids), sampling, echo, deadline, send)
        self._tasks.add(task)
        self.engine.submit(task)
        try:
            while True:
                item = await _next(items, task)
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, Generated):
                    return
        finally:
            self._tasks.discard(task)
            self.engine.cancel(task)


async def _next(items: asyncio.Queue[Item], task: Task) -> Item:
    """Returns the next item of a task.

    Raises:
        ApiError: the time limit passed before the task was started.
    """
    if not task.started:
        try:
            return await asyncio.wait_for(items.get(), max(0, task.deadline - time.monotonic()))
        except TimeoutError:
            if not task.started:
                raise timeout_error() from None
    return await items.get()
