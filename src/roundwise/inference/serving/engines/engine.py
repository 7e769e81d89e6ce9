"""Generates the answers of requests one at a time, with transformers' `generate`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from roundwise.inference.generation import Generated, generate, text_of
from roundwise.inference.prompt_logprobs import prompt_logprobs
from roundwise.inference.sampling import Sampling, TokenLogprobs
from roundwise.inference.serving.api_errors import stopping_error, timeout_error
from roundwise.inference.serving.responses import Piece

Item = Piece | Generated | Exception


@dataclass(eq=False)
class Task:
    """One answer to generate."""

    ids: list[int]
    """Token ids of the prompt."""
    sampling: Sampling
    echo: bool
    """Send the prompt first."""
    deadline: float
    """Time (time.monotonic) at which the generation ends with the text so far."""
    send: Callable[[Item], None]
    """Receives the pieces, then the answer or an error; from any thread."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """The answer is not wanted any more."""
    started: bool = False
    """It is being computed; until then, the time limit is an error."""
    sent: int = 0
    """Number of items that were sent."""
    _logprobs: list[TokenLogprobs] = field(default_factory=list)

    def must_stop(self) -> bool:
        """Tells whether the generation must end at this token."""
        return self.cancelled.is_set() or time.monotonic() > self.deadline

    def add_logprobs(self, entries: list[TokenLogprobs]) -> None:
        """Keeps log probabilities for the next piece."""
        self._logprobs += entries

    def send_text(self, text: str) -> None:
        """Sends a piece of text."""
        entries, self._logprobs = tuple(self._logprobs), []
        self.send(Piece(text, entries))

    def finish(self, answer: Generated) -> None:
        """Sends the end of the answer."""
        if self._logprobs:  # of tokens without text, like the end-of-text token
            self.send_text("")
        self.send(answer)


class Engine(Protocol):
    """Generates the answers of tasks."""

    description: str
    """Its way of generating, for the user."""

    def submit(self, task: Task) -> None:
        """Starts a task, or lets it wait; its answer or an error is sent."""

    def cancel(self, task: Task) -> None:
        """Ends a task whose answer is not wanted any more."""

    def stop(self) -> None:
        """Ends all running tasks at their next token; those that wait fail."""

    def close(self, seconds: float) -> bool:
        """Stops; returns False if a computation is still running after some seconds."""


class SingleEngine:
    """Runs `generate` in a thread of its own, in the order of arrival."""

    description = "one request at a time"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._closing, self._ended = threading.Event(), threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="roundwise-generate")

    def submit(self, task: Task) -> None:
        """Puts a task at the end of the queue."""
        try:
            self._thread.submit(self._run, task)
        except RuntimeError:  # it is shut down
            task.send(stopping_error())

    def cancel(self, task: Task) -> None:
        """Ends a task at its next token."""
        task.cancelled.set()

    def _run(self, task: Task) -> None:
        def must_stop() -> bool:
            return task.must_stop() or self._closing.is_set()

        try:
            if self._closing.is_set():
                raise stopping_error()
            if task.must_stop():
                raise timeout_error()
            task.started = True
            if send_prompt(self.model, self.tokenizer, task):
                return
            answer = generate(
                self.model, self.tokenizer, task.ids, task.sampling, on_text=task.send_text,
                on_logprobs=task.add_logprobs, cancelled=must_stop,
            )  # fmt: skip
            task.finish(answer)
        except Exception as error:  # any error of the model ends this request, not the server
            task.send(error)

    def stop(self) -> None:
        """Ends the running generation at its next token; those that wait fail."""
        self._closing.set()

    def close(self, seconds: float) -> bool:
        """Stops; returns False if the generation is still running after some seconds."""
        self.stop()
        with suppress(RuntimeError):  # it is closed already
            self._thread.submit(self._ended.set)  # after everything that waits, which fails at once
        ended = self._ended.wait(seconds)
        self._thread.shutdown(wait=ended)
        return ended


def send_prompt(
    model: Any,
    tokenizer: Any,
    task: Task,
    use_model: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> bool:
    """Sends the prompt of a task with `echo`; returns True if nothing is to be generated.

    Args:
        model: transformers causal language model.
        tokenizer: its tokenizer.
        task: task to begin.
        use_model: returns a context manager for the time in which the model computes.
    """
    if not task.echo:
        return False
    if task.sampling.logprobs is not None:
        with use_model():
            task.add_logprobs(
                prompt_logprobs(
                    model, task.ids, task.sampling.logprobs, text_of(tokenizer), task.must_stop
                )
            )
    task.send_text(
        tokenizer.decode(
            task.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    )  # fmt: skip
    if task.sampling.max_new_tokens:
        return False
    task.finish(Generated("", len(task.ids), 0, "length", 0.0, 0.0))
    return True
