"""Generating text, piece by piece: what `generate` and the server share, so that they agree.

Knows token ids, a transformers model and its tokenizer; nothing of prompts, chats or requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from roundwise.errors import ConfigError

#: Tokens of the prompt that are decoded with the answer: some decoders drop a leading space.
CONTEXT = 6
#: What a decoder writes for bytes that are no character, or not yet one.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. None: what the model's generation_config.json says, or no limit."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""

    def arguments(self, model: Any) -> dict[str, Any]:
        """For `model.generate`."""
        own = model.generation_config
        chosen: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "repetition_penalty": _first(self.repetition_penalty, own.repetition_penalty, 1.0),
        }
        if self.temperature > 0:
            chosen["temperature"] = self.temperature
            chosen["top_p"] = _first(self.top_p, own.top_p, 1.0)
            chosen["top_k"] = _first(self.top_k, own.top_k, 0)
            chosen["min_p"] = _first(self.min_p, own.min_p)
        return chosen


@dataclass(frozen=True)
class Generated:
    """An answer and how it came about."""

    text: str
    prompt_tokens: int
    tokens: int
    """Generated ones, the end-of-text token included."""
    finish: Literal["stop", "length", "cancelled"]
    first_token_seconds: float
    """From the call to the first token: the time the prompt takes."""
    seconds: float

    @property
    def prompt_tokens_per_second(self) -> float:
        """Tokens of the prompt over the time to the first token."""
        return self.prompt_tokens / self.first_token_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Generated tokens after the first over their time; None if there was only one."""
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
    """Goes on from token ids until the end of the text, a stop text or the limit.

    Args:
        model: transformers causal language model.
        tokenizer: its tokenizer.
        ids: what to go on from.
        sampling: how tokens are chosen.
        on_text: called with each piece of text; joined they are the answer.
        cancelled: asked after each token; True ends the generation.

    Raises:
        ConfigError: no ids, or a limit below one token.
    """
    if not ids or sampling.max_new_tokens < 1:
        raise ConfigError("a prompt of at least one token and one token to generate are needed")
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    inputs = torch.tensor([ids], device=model.device)
    watch = _Watch(Detokenizer(tokenizer, ids), StopTexts(sampling.stop), on_text, cancelled)
    begun = time.monotonic()
    model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        stopping_criteria=StoppingCriteriaList([watch]),
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        **sampling.arguments(model),
    )
    seconds = time.monotonic() - begun
    if watch.finish is None:
        watch.emit(watch.detokenizer.rest())
        watch.emit_last(watch.stops.rest())
    ended = watch.last in _end_tokens(model)
    finish = watch.finish or ("stop" if ended else "length")
    assert watch.first is not None
    return Generated(
        "".join(watch.pieces), len(ids), watch.count, finish, watch.first - begun, seconds
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _end_tokens(model: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


class _Watch(StoppingCriteria):  # type: ignore[misc]  # untyped there
    """Called by `generate` after each token: hands the text on and says when to stop."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopTexts,
        on_text: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self.detokenizer, self.stops = detokenizer, stops
        self.on_text, self.cancelled = on_text, cancelled
        self.pieces: list[str] = []
        self.count, self.last = 0, -1
        self.first: float | None = None
        self.finish: Literal["stop", "cancelled"] | None = None

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        self.last = int(input_ids[0, -1])
        if self.first is None:
            self.first = time.monotonic()
        self.count += 1
        self.emit(self.detokenizer.add(self.last))
        if self.stops.found:
            self.finish = "stop"
        elif self.cancelled():
            self.finish = "cancelled"
        return torch.tensor([self.finish is not None], device=input_ids.device)

    def emit(self, piece: str) -> None:
        """Passes a piece through the search for stop texts."""
        self.emit_last(self.stops.add(piece))

    def emit_last(self, piece: str) -> None:
        """Hands a piece on."""
        if piece:
            self.pieces.append(piece)
            self.on_text(piece)


class Detokenizer:
    """Token ids to text as they come: never half a character, and joined what all of them decode to.

    Args:
        tokenizer: decodes lists of ids.
        prompt: what the answer follows; its end is decoded along, so that a space at the seam stays.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT:])
        self._context, self._given = 0, len(self._ids)

    def _decode(self, begin: int, end: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[begin:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def add(self, token: int) -> str:
        """The text that is certain after one more token."""
        self._ids.append(token)
        piece = self.rest()
        if not piece or piece.endswith(INCOMPLETE):
            return ""
        self._context, self._given = self._given, len(self._ids)
        return piece

    def rest(self) -> str:
        """What `add` has not given yet."""
        before = self._decode(self._context, self._given)
        return self._decode(self._context, len(self._ids))[len(before) :]


class StopTexts:
    """Finds stop texts in a text that comes in pieces, and holds back what may be the start of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """The part of the text that belongs to the answer for certain."""
        if self.found:
            return ""
        text = self._held + piece
        hits = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            self.found, self._held = True, ""
            return text[: min(hits)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
