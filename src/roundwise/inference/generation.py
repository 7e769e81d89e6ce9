"""Text generation in pieces, used by both `roundwise generate` and the server.

It works with token ids, a transformers model and its tokenizer, not with prompts, chats or requests.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from roundwise.errors import ConfigError
from roundwise.inference.detokenizer import Detokenizer, StopStrings
from roundwise.inference.sampling import Sampler, Sampling, TokenLogprobs, pinned_config
from roundwise.model.foreign_errors import foreign_errors

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Generated:
    """A generated answer, its token counts and timings."""

    text: str
    prompt_tokens: int
    tokens: int
    """Number of generated tokens, the end-of-text token included."""
    finish: Finish
    """Reason for the end: an end-of-text token or stop string, the token limit, or the caller."""
    first_token_seconds: float
    """Seconds from the call to the first token: the time that the prompt takes."""
    seconds: float
    """Seconds from the call to the last token."""
    ids: tuple[int, ...] = ()
    """The generated tokens."""

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens per second, until the first token."""
        return self.prompt_tokens / self.first_token_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Generated tokens per second after the first token; None if there was only one."""
        rest = self.seconds - self.first_token_seconds
        return (self.tokens - 1) / rest if self.tokens > 1 and rest > 0 else None


def generate(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    sampling: Sampling,
    *,
    on_text: Callable[[str], None] = lambda _: None,
    on_logprobs: Callable[[list[TokenLogprobs]], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Generated:
    """Generates until the end-of-text token, a stop string or the token limit.

    Args:
        model: transformers causal language model.
        tokenizer: its tokenizer.
        ids: token ids of the prompt.
        sampling: sampling parameters.
        on_text: called with each new piece of text; the joined pieces are the answer.
        on_logprobs: called before `on_text` with the tokens of the piece, if `sampling` asks for log
            probabilities; once more at the end with tokens that have no text.
        cancelled: called after each token; generation ends when it returns True.

    Raises:
        ConfigError: no ids, or a limit below one token.
        NumericalError: the model computed NaN or infinity.
    """
    if not ids or sampling.max_new_tokens < 1:
        raise ConfigError("generation needs a prompt of at least one token and max_new_tokens >= 1")
    inputs = torch.tensor([ids], device=model.device)
    # generation_config.json, the config and the model's code can make transformers raise any error.
    with foreign_errors(f"{type(model).__name__} cannot generate with the settings of its files"):
        answer = Answer(model, tokenizer, ids, sampling, on_text, on_logprobs, cancelled)
        with pinned_config(model, sampling.max_new_tokens, _padding(model, tokenizer)) as config:
            model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=config,
                logits_processor=LogitsProcessorList([_ChooseToken(answer)]),
                stopping_criteria=StoppingCriteriaList([_AddToken(answer)]),
            )
    return answer.result()


def _padding(model: Any, tokenizer: Any) -> int:
    """Returns a token for padding; nothing is padded here, but transformers wants one."""
    eos = _eos_token_ids(model)
    return next(
        (t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id, *eos) if t is not None), 0
    )


def _eos_token_ids(model: Any) -> list[int]:
    eos = model.generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


class _ChooseToken(LogitsProcessor):  # type: ignore[misc]  # untyped there
    """Logits processor: chooses the next token, and leaves only this one possible."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(scores, -math.inf)
        chosen[0, self._answer.choose(scores.cpu())] = 0.0
        return chosen


class _AddToken(StoppingCriteria):  # type: ignore[misc]  # untyped there
    """Stopping criterion that `generate` calls after each token: passes it on to the answer."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        ended = self._answer.add(int(input_ids[0, -1]))
        return torch.tensor([ended], device=input_ids.device)


class Answer:
    """An answer that grows token by token: sends its text, and finds its end.

    Args:
        model: transformers causal language model.
        tokenizer: its tokenizer.
        ids: token ids of the prompt.
        sampling: sampling parameters.
        on_text, on_logprobs, cancelled: as for `generate`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        ids: list[int],
        sampling: Sampling,
        on_text: Callable[[str], None],
        on_logprobs: Callable[[list[TokenLogprobs]], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._sampler = Sampler(sampling, model.generation_config, text_of(tokenizer))
        self._ids = list(ids)
        self._detokenizer, self._stop_strings = (
            Detokenizer(tokenizer, ids),
            StopStrings(sampling.stop),
        )
        self._on_text, self._on_logprobs, self._cancelled = on_text, on_logprobs, cancelled
        self._eos, self._limit = _eos_token_ids(model), sampling.max_new_tokens
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprobs] = []  # of tokens whose text was not sent yet
        self._prompt_tokens, self._tokens = len(ids), 0
        self._finish: Finish | None = None
        self._begun_at = time.monotonic()
        self._first_token_at = self._last_token_at = self._begun_at

    def choose(self, scores: torch.Tensor) -> int:
        """Returns the next token.

        Args:
            scores: logits [1, vocabulary] on the CPU.

        Raises:
            NumericalError: the model computed NaN or infinity.
        """
        return self._sampler.choose(self._ids, scores)

    def add(self, token: int) -> bool:
        """Adds a token; returns True if it ends the answer."""
        self._last_token_at = time.monotonic()
        if self._tokens == 0:
            self._first_token_at = self._last_token_at
        self._tokens += 1
        self._ids.append(token)
        if self._sampler.last is not None:
            self._logprobs.append(self._sampler.last)
        self._send(self._stop_strings.add(self._detokenizer.add(token)))
        if self._stop_strings.matched or token in self._eos:
            self._finish = "stop"
        elif self._tokens >= self._limit:
            self._finish = "length"
        elif self._cancelled():
            self._finish = "cancelled"
        return self._finish is not None

    def result(self) -> Generated:
        """Sends the text that was held back, and returns the answer; to be called once, at the end."""
        assert self._finish is not None
        self._send(self._stop_strings.add(self._detokenizer.flush()))
        self._send(self._stop_strings.flush())
        if self._logprobs:
            self._on_logprobs(self._logprobs)
        return Generated(
            text="".join(self._pieces),
            prompt_tokens=self._prompt_tokens,
            tokens=self._tokens,
            finish=self._finish,
            first_token_seconds=self._first_token_at - self._begun_at,
            seconds=self._last_token_at - self._begun_at,
            ids=tuple(self._ids[self._prompt_tokens :]),
        )

    def _send(self, piece: str) -> None:
        if not piece:
            return
        self._pieces.append(piece)
        if self._logprobs:
            self._on_logprobs(self._logprobs)
            self._logprobs = []
        self._on_text(piece)


def text_of(tokenizer: Any) -> Callable[[int], str]:
    """Returns a function that decodes a single token; it remembers the last ones."""

    @lru_cache(4096)
    def decode(token: int) -> str:
        text: str = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text

    return decode
