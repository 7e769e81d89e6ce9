"""Text generation in pieces, used by both `roundwise generate` and the server.

It works with token ids, a transformers model and its tokenizer, not with prompts, chats or requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from roundwise.errors import ConfigError
from roundwise.model.foreign_errors import foreign_errors

#: Last tokens of the prompt that are decoded with the answer: some decoders drop a leading space.
CONTEXT_TOKENS = 6
#: Decoders write this for bytes that are not a complete character (yet).
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. None: the value in the model's generation_config.json, else no limit."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: greedy, always the most likely token."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Stop strings: the answer ends in front of the first one."""

    def generate_kwargs(self, model: Any) -> dict[str, Any]:
        """Returns keyword arguments for `model.generate`."""
        defaults = model.generation_config
        kwargs: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "repetition_penalty": _first_set(
                self.repetition_penalty, defaults.repetition_penalty, 1.0
            ),
        }
        if self.temperature > 0:
            kwargs["temperature"] = self.temperature
            kwargs["top_p"] = _first_set(self.top_p, defaults.top_p, 1.0)
            kwargs["top_k"] = _first_set(self.top_k, defaults.top_k, 0)
            kwargs["min_p"] = _first_set(self.min_p, defaults.min_p)
        return kwargs


@dataclass(frozen=True)
class Generated:
    """A generated answer, its token counts and timings."""

    text: str
    prompt_tokens: int
    tokens: int
    """Number of generated tokens, the end-of-text token included."""
    finish: Literal["stop", "length", "cancelled"]
    """Reason for the end: an end-of-text token or stop string, the token limit, or the caller."""
    first_token_seconds: float
    """Seconds from the call to the first token: the time that the prompt takes."""
    seconds: float
    """Seconds from the call to the last token."""

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
    cancelled: Callable[[], bool] = lambda: False,
) -> Generated:
    """Generates until the end-of-text token, a stop string or the token limit.

    Args:
        model: transformers causal language model.
        tokenizer: its tokenizer.
        ids: token ids of the prompt.
        sampling: sampling parameters.
        on_text: called with each new piece of text; the joined pieces are the answer.
        cancelled: called after each token; generation ends when it returns True.

    Raises:
        ConfigError: no ids, or a limit below one token.
    """
    if not ids or sampling.max_new_tokens < 1:
        raise ConfigError("generation needs a prompt of at least one token and max_new_tokens >= 1")
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    inputs = torch.tensor([ids], device=model.device)
    streamer = _Streamer(
        Detokenizer(tokenizer, ids), StopStrings(sampling.stop), on_text, cancelled
    )
    begin = time.monotonic()
    # generation_config.json, the config and the model's code can make transformers raise any error.
    with foreign_errors(f"{type(model).__name__} cannot generate with the settings of its files"):
        model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            stopping_criteria=StoppingCriteriaList([streamer]),
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            **sampling.generate_kwargs(model),
        )
    seconds = time.monotonic() - begin
    if streamer.finish is None:
        streamer.flush()
    at_end = streamer.last_token in _eos_token_ids(model)
    finish = streamer.finish or ("stop" if at_end else "length")
    assert streamer.first_token_at is not None
    return Generated(
        text="".join(streamer.pieces),
        prompt_tokens=len(ids),
        tokens=streamer.tokens,
        finish=finish,
        first_token_seconds=streamer.first_token_at - begin,
        seconds=seconds,
    )


def _first_set(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _eos_token_ids(model: Any) -> list[int]:
    eos = model.generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


class _Streamer(StoppingCriteria):  # type: ignore[misc]  # untyped there
    """Stopping criterion that `generate` calls after each token: sends new text, and ends generation."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop_strings: StopStrings,
        on_text: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self.detokenizer, self.stop_strings = detokenizer, stop_strings
        self.on_text, self.cancelled = on_text, cancelled
        self.pieces: list[str] = []
        self.tokens, self.last_token = 0, -1
        self.first_token_at: float | None = None
        self.finish: Literal["stop", "cancelled"] | None = None

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        self.last_token = int(input_ids[0, -1])
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self.tokens += 1
        self._send(self.stop_strings.add(self.detokenizer.add(self.last_token)))
        if self.stop_strings.matched:
            self.finish = "stop"
        elif self.cancelled():
            self.finish = "cancelled"
        return torch.tensor([self.finish is not None], device=input_ids.device)

    def flush(self) -> None:
        """Sends the text that was held back."""
        self._send(self.stop_strings.add(self.detokenizer.flush()))
        self._send(self.stop_strings.flush())

    def _send(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
            self.on_text(piece)


class Detokenizer:
    """Streaming detokenizer: returns whole characters; joined, they are the decoded answer.

    `tokenizers.decoders.DecodeStream` cannot replace it: with byte-fallback vocabularies it raises an
    error on generated bytes that are not UTF-8, it cannot be flushed, and slow tokenizers lack it.

    Args:
        tokenizer: transformers tokenizer, fast or slow.
        prompt: token ids of the prompt; the last ones are decoded along, which keeps a space between
            prompt and answer.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        # Tokens from `_context` to `_returned` are decoded only as context; their text was returned.
        self._context, self._returned = 0, len(self._ids)

    def _decode(self, begin: int, end: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[begin:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def add(self, token: int) -> str:
        """Returns the text that one more token completes; "" if it ends inside a character."""
        self._ids.append(token)
        piece = self.flush()
        if not piece or piece.endswith(INCOMPLETE):
            return ""
        self._context, self._returned = self._returned, len(self._ids)
        return piece

    def flush(self) -> str:
        """Returns the text that `add` has not returned yet."""
        context = self._decode(self._context, self._returned)
        return self._decode(self._context, len(self._ids))[len(context) :]


class StopStrings:
    """Finds stop strings in a text that arrives in pieces; holds back what may be the start of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.matched = False
        """A stop string was found."""

    def add(self, piece: str) -> str:
        """Returns the text up to here that certainly belongs to the answer and is new."""
        if self.matched:
            return ""
        text = self._held + piece
        positions = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if positions:
            self.matched, self._held = True, ""
            return text[: min(positions)]
        keep = max((_partial_match(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Returns the text that was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held


def _partial_match(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
