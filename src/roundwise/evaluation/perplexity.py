"""Perplexity of a long text in sliding windows, as in the WikiText-2 example of transformers' docs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from roundwise.calibration.special_tokens import SpecialTokens, special_tokens
from roundwise.errors import CalibrationError, NumericalError
from roundwise.model.foreign_errors import foreign_errors
from roundwise.system.half_matmul import cpu_half_matmul


@dataclass(frozen=True)
class Perplexity:
    """Perplexity: exp of the mean negative log-likelihood per predicted token."""

    perplexity: float
    tokens: int
    """Number of predicted tokens; a window's first token is one if special tokens stand before it."""
    window: int
    stride: int


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str | list[int],
    *,
    window: int = 2048,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 4,
    special: SpecialTokens | None = None,
    progress: Callable[[float], None] | None = None,
) -> Perplexity:
    """Measures the perplexity of a causal language model on a text.

    Windows start every `stride` tokens. In each window, only tokens that no earlier window has predicted
    count; the others are context. Every window begins with what the tokenizer puts in front of a text
    (<bos>), which is context too. Where that is nothing, the first token of the text is not predicted,
    and with stride = window the first one of each window.

    Args:
        model: transformers causal language model.
        tokenizer: its tokenizer; it may be None if `text` is a list of token ids.
        text: one long text, or its token ids without special tokens.
        window: tokens the model sees at once, special ones included.
        stride: tokens from one window to the next, 1 … window; None: windows do not overlap.
        max_tokens: number of tokens of the text to use; None: all.
        batch_size: windows in one forward.
        special: special tokens around every window; None: those that the tokenizer adds to a text.
        progress: called with the finished part, 0 … 1.

    Raises:
        CalibrationError: nothing can be predicted: too few tokens, or too short a window or stride.
        NumericalError: the model's output is NaN or infinite.
    """
    around = special_tokens(tokenizer) if special is None else special
    windows = cut_windows(token_ids(tokenizer, text)[:max_tokens], window, stride, around)
    spans = windows.spans
    total, count = 0.0, 0
    for start in range(0, len(spans), batch_size):
        batch = spans[start : start + batch_size]
        # The last window can be shorter than the others: it then gets a forward of its own.
        for equally_long in _by_length(batch):
            for logits, tokens in predictions(model, windows, equally_long):
                nll = functional.cross_entropy(logits, tokens, reduction="none")
                total, count = total + float(nll.double().sum()), count + len(tokens)
        if progress is not None:
            progress(min(1.0, (start + len(batch)) / len(spans)))
    if not math.isfinite(total):
        raise NumericalError("the model's output is NaN or infinite")
    return Perplexity(math.exp(total / count), count, windows.window, windows.stride)


class Span(NamedTuple):
    """A window: tokens begin … end - 1 of the text, of which those from `first` on are counted."""

    begin: int
    first: int
    end: int


@dataclass(frozen=True)
class Windows:
    """A text cut into windows, and the tokens of each that count."""

    ids: list[int]
    """Token ids of the text, without special tokens."""
    special: SpecialTokens
    """Special tokens around every window."""
    window: int
    """Tokens of a window, special ones included."""
    stride: int
    spans: list[Span]

    def row(self, span: Span) -> list[int]:
        """Returns the token ids of a window, with its special tokens."""
        return self.special.around(self.ids[span.begin : span.end])

    def counted(self, span: Span) -> slice:
        """Returns the places in the window's row of the tokens that count."""
        offset = len(self.special.prefix) - span.begin
        return slice(offset + span.first, offset + span.end)


def token_ids(tokenizer: Any, text: str | list[int]) -> list[int]:
    """Returns the token ids of a text without special tokens; token ids are returned as they are."""
    if not isinstance(text, str):
        return text
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def cut_windows(ids: list[int], window: int, stride: int | None, special: SpecialTokens) -> Windows:
    """Cuts a text into windows that overlap, each with the tokens that no earlier window has predicted.

    Args:
        ids: token ids of the text, without special tokens.
        window: tokens of a window, special ones included; less if the text is shorter.
        stride: tokens from one window to the next; None: windows do not overlap.
        special: special tokens around every window.

    Raises:
        CalibrationError: nothing can be predicted: too few tokens, or too short a window or stride.
    """
    size = min(window - special.count, len(ids))  # tokens of the text in a window
    stride = size if stride is None else min(stride, size)
    first = 0 if special.prefix else 1
    if size <= first or stride < 1:
        raise CalibrationError(
            f"nothing to predict: {len(ids)} tokens, window {size + special.count}, stride {stride}; "
            f"the minimum is {first + 1}, {special.count + first + 1} and 1"
        )
    spans = _spans(len(ids), size, stride, first)
    return Windows(ids, special, size + special.count, stride, spans)


def _spans(length: int, size: int, stride: int, unpredicted: int) -> list[Span]:
    """Returns all windows of a text of `length` tokens that have a token to count.

    Args:
        length: tokens of the text.
        size: tokens of the text in a window.
        stride: tokens from one window to the next.
        unpredicted: first tokens of a window that nothing predicts: 0 or 1.
    """
    spans, counted = [], 0
    for begin in range(0, length, stride):
        end = min(begin + size, length)
        first = max(counted, begin + unpredicted)
        if end > first:
            spans.append(Span(begin, first, end))
        counted = end
        if end == length:
            break
    return spans


def _by_length(spans: list[Span]) -> list[list[Span]]:
    groups: dict[int, list[Span]] = {}
    for span in spans:
        groups.setdefault(span.end - span.begin, []).append(span)
    return list(groups.values())


@torch.no_grad()
def predictions(
    model: Any, windows: Windows, spans: list[Span]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields for each window the predictions of the tokens that count, and these tokens.

    Args:
        model: transformers causal language model.
        windows: the text in windows.
        spans: those of its windows that one forward computes; they have equal lengths.

    Yields:
        Float32 logits [tokens, vocabulary], and token ids [tokens].
    """
    inputs = torch.tensor([windows.row(span) for span in spans], device=model.device)
    with cpu_half_matmul(), foreign_errors(f"{type(model).__name__} fails on the evaluation text"):
        logits = model(input_ids=inputs, use_cache=False).logits
    for row, span in enumerate(spans):
        counted = windows.counted(span)
        # Position p predicts token p + 1.
        yield logits[row, counted.start - 1 : counted.stop - 1].float(), inputs[row, counted]
