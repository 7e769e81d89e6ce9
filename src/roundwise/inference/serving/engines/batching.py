"""Generates the answers of several requests together, with transformers' continuous batching.

Each step computes one token of every running request, so the weights are read once for all of them.
transformers schedules requests and keeps their keys and values; tokens are chosen by each request's own
`Sampler`, as when it is alone. It uses the cache of one model; not every model can be computed so.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import psutil
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import OutputRouter

from roundwise.errors import ConfigError, first_line
from roundwise.inference.generation import Answer, generate
from roundwise.inference.sampling import Sampling, TokenLogprobs
from roundwise.inference.serving.api_errors import stopping_error
from roundwise.inference.serving.engines.engine import Item, Task, send_prompt
from roundwise.inference.serving.responses import Piece
from roundwise.model.build import text_config

#: Tokens of keys and values that are stored together.
PAGE = 64
#: Most tokens of a step: a long prompt is computed in several, and delays the others by one each time.
STEP_TOKENS = 256
#: Tokens of keys and values for which there is room, if the memory allows it.
CACHE_TOKENS = 65_536
#: Share of the free memory that keys and values may take.
MEMORY_SHARE = 0.5
#: Largest differences of log probabilities to the model alone, in float32 and in half precision.
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.25
#: What transformers does by itself, each from some version on, and must not do here.
SWITCHED_OFF = (
    "use_cuda_graph",
    "use_async_batching",
    "allow_block_sharing",
    "auto_switch_to_flash",
)
#: Seconds in which a first request must be answered.
PROBE_SECONDS = 600
PROBE_SAMPLING = Sampling(8, logprobs=3)


class BatchedEngine:
    """Computes up to `max_batch` requests at the same time.

    Args:
        model: transformers causal language model.
        tokenizer: its tokenizer.
        max_batch: most requests that are computed together.
        context: most tokens of a request.

    Raises:
        ConfigError: this model cannot be computed in batches.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_batch: int, context: int) -> None:
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.description = f"up to {max_batch} requests at the same time"
        self._pages = _page_count(model, max_batch, context)
        self._tasks: dict[str, Task] = {}
        self._numbers = itertools.count()
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._attention = model.config._attn_implementation
        vocabulary = text_config(model.config).vocab_size
        probe = [
            token % vocabulary
            for token in range(3, min(67, context - PROBE_SAMPLING.max_new_tokens))
        ]
        try:
            with _quiet():
                alone: list[TokenLogprobs] = []
                generate(model, tokenizer, probe, PROBE_SAMPLING, on_logprobs=alone.extend)
                self._manager = self._started()
                self._check(probe, alone)
        except Exception as error:  # transformers raises many types; all mean the same here
            self.close(5)
            raise ConfigError(f"this model cannot be batched: {first_line(error)}") from error

    def _started(self) -> Any:
        """Returns a running manager of transformers."""
        self.model.set_attn_implementation("sdpa")  # ours does not know pages
        names = {field.name for field in fields(ContinuousBatchingConfig)}
        config = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=self._pages, max_batch_tokens=STEP_TOKENS,
            max_requests_per_batch=self.max_batch,
            **{name: False for name in SWITCHED_OFF if name in names},
        )  # fmt: skip
        # The end of an answer is found by `Answer`, so there is no end-of-text token here.
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        manager = self.model.init_continuous_batching(generation, config)
        manager.logit_processor = _processors(self)
        manager.output_router = _Router(self)
        manager.start()
        return manager

    def submit(self, task: Task) -> None:
        """Adds a task; it waits if there is no room for it."""
        # In a thread, because the prompt of a task with `echo` is computed before it is added.
        threading.Thread(target=self._begin, args=(task,), daemon=True).start()

    def _begin(self, task: Task) -> None:
        try:
            manager = self._running_manager()
            if send_prompt(self.model, self.tokenizer, task, manager.pause):
                return
            answer = Answer(
                self.model, self.tokenizer, task.ids, task.sampling, task.send_text,
                task.add_logprobs, lambda: task.must_stop() or self._closing.is_set(),
            )  # fmt: skip
            name = str(next(self._numbers))
            self._tasks[name] = task
            if self._closing.is_set() or task.cancelled.is_set():
                raise stopping_error()
            added = manager.add_request(
                task.ids, name, max_new_tokens=task.sampling.max_new_tokens, job=_Job(task, answer)
            )
            if added is None:
                raise stopping_error()
        except Exception as error:  # any error of the model ends this request, not the server
            task.send(error)

    def _running_manager(self) -> Any:
        """Returns the manager; after an error of the model, which ends its thread, a new one."""
        with self._lock:
            if not self._manager.is_running() and not self._closing.is_set():
                self._manager = self._started()
            return self._manager

    def cancel(self, task: Task) -> None:
        """Ends a task before its next token."""
        task.cancelled.set()
        for name in [name for name, other in list(self._tasks.items()) if other is task]:
            self._forget(name)

    def _forget(self, name: str) -> None:
        if self._tasks.pop(name, None) is not None:
            self._manager.cancel_request(name)

    def fail(self, name: str, error: Exception) -> None:
        """Ends a task with an error."""
        task = self._tasks.get(name)
        self._forget(name)
        if task is not None:
            task.send(error)

    def advance(self, name: str, job: _Job, scores: torch.Tensor) -> int:
        """Chooses the next token of a task, from logits [1, vocabulary], and adds it to its answer."""
        if name not in self._tasks:
            return 0  # it has ended, and is removed before the next step
        try:
            job.task.started = True
            token = job.answer.choose(scores.cpu())
            if job.answer.add(token):
                job.task.finish(job.answer.result())
                self._forget(name)
        except Exception as error:  # any error ends this request, not those that run beside it
            self.fail(name, error)
            return 0
        return token

    def stop(self) -> None:
        """Ends running tasks at their next token; those that wait fail."""
        self._closing.set()
        for name, task in list(self._tasks.items()):
            if not task.started:
                self.fail(name, stopping_error())

    def close(self, seconds: float) -> bool:
        """Stops; returns False if a step is still being computed after some seconds."""
        self.stop()
        manager = getattr(self, "_manager", None)
        if manager is not None:
            manager.stop(block=True, timeout=seconds, hard_stop=True)
            if manager.is_running():
                return False
        self.model.set_attn_implementation(self._attention)
        return True

    def _check(self, probe: list[int], alone: list[TokenLogprobs]) -> None:
        """Compares the probabilities of a text with those that the model computes alone."""
        ended = threading.Event()
        items: list[Item] = []

        def send(item: Item) -> None:
            items.append(item)
            if not isinstance(item, Piece):
                ended.set()

        self._begin(Task(probe, PROBE_SAMPLING, False, math.inf, send))
        if not ended.wait(PROBE_SECONDS):
            raise RuntimeError(f"a first request takes more than {PROBE_SECONDS} seconds")
        if isinstance(items[-1], Exception):
            raise items[-1]
        batched = [entry for item in items if isinstance(item, Piece) for entry in item.logprobs]
        tolerance = TOLERANCE if self.model.dtype == torch.float32 else HALF_TOLERANCE
        for one, other in zip(alone, batched, strict=True):
            pairs = zip(one.top, other.top, strict=True)
            if any(abs(first - second) > tolerance for (_, first), (_, second) in pairs):
                raise RuntimeError("its probabilities differ from those of one request at a time")
            if one.text != other.text:
                return  # a tie; what follows is another text


@dataclass(frozen=True)
class _Job:
    """A task, with the answer that grows; transformers carries it along with the request."""

    task: Task
    answer: Answer

    def __deepcopy__(self, _memo: Any) -> _Job:
        """Returns the job itself: a request that makes room for others is copied, and resumes later."""
        return self


class _ChooseTokens(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]  # untyped there
    """Logits processor: chooses the token of each request, and leaves only this one possible."""

    supported_kwargs: ClassVar[dict[str, type]] = {"job": _Job}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, engine: BatchedEngine) -> None:
        self._engine = engine
        self._states: list[Any] = []  # of the requests in this step, in the order of their rows

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Fills arguments of rows that belong to no request; there are none."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """Notes the requests of the next step."""
        self._states = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self._states), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Returns logits [rows, vocabulary] that are zero for the chosen tokens."""
        chosen = torch.full_like(scores, -math.inf)
        chosen[:, 0] = 0.0
        for row, state in enumerate(self._states):
            job = state.logit_processor_kwargs["job"]
            token = self._engine.advance(state.request_id, job, scores[row : row + 1])
            chosen[row, 0] = -math.inf
            chosen[row, token] = 0.0
        return chosen


class _Router(OutputRouter):  # type: ignore[misc]  # untyped there
    """Receives the results of transformers: answers were sent by then, but failures were not."""

    def __init__(self, engine: BatchedEngine) -> None:
        super().__init__()
        self._engine = engine

    def deliver(self, output: Any) -> None:
        """Ends a request that failed."""
        if output.error is not None:
            self._engine.fail(output.request_id, RuntimeError(output.error))

    def deliver_batch(self, outputs: list[Any]) -> None:
        """Ends requests that failed."""
        for output in outputs:
            self.deliver(output)


def _processors(engine: BatchedEngine) -> Any:
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_ChooseTokens(engine)]))
    processors.tensors_required = 1
    return processors


def _page_count(model: Any, max_batch: int, context: int) -> int:
    """Returns the number of pages for keys and values: room for one request of any length, at least.

    Raises:
        ConfigError: the memory has no room for that.
    """
    config = text_config(model.config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    page_bytes = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize * PAGE
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    room = int(free * MEMORY_SHARE) // page_bytes
    needed = -(-context // PAGE) + 1
    if room < needed:
        raise ConfigError(
            f"this model cannot be batched: keys and values of {context} tokens need "
            f"{needed * page_bytes / 1e9:.1f} GB, more than half of the free memory"
        )
    return int(min(room, max(needed, min(needed * max_batch, CACHE_TOKENS // PAGE))))


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager: transformers prints no traceback of a model that cannot be batched."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
