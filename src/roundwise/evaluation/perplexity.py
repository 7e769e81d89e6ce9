"""Perplexity of a long text in sliding windows, as in the WikiText-2 example of transformers' docs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from roundwise.errors import CalibrationError, NumericalError
from roundwise.model.foreign_errors import foreign_errors
from roundwise.system.half_matmul import cpu_half_matmul


@dataclass(frozen=True)
class Perplexity:
    """Perplexity: exp of the mean negative log-likelihood per predicted token."""

    perplexity: float
    tokens: int
    """Number of predicted tokens; the first token of a window cannot be predicted."""
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
    progress: Callable[[float], None] | None = None,
) -> Perplexity:
    """Measures the perplexity of a causal language model on a text.

    Windows start every `stride` tokens. In each window, only tokens that no earlier window has predicted
    count; the others are context. With stride = window, windows do not overlap, and the first token of
    each window is not predicted.

    Args:
        model: transformers causal language model.
        tokenizer: its tokenizer; not used if `text` is a list of token ids.
        text: one long text, or its token ids.
        window: tokens the model sees at once.
        stride: tokens from one window to the next, 1 … window; None: the window.
        max_tokens: number of tokens of the text to use; None: all.
        batch_size: windows in one forward.
        progress: called with the finished part, 0 … 1.

    Raises:
        CalibrationError: fewer than two tokens, a window of less than two, or a stride of less than one.
        NumericalError: the model's output is NaN or infinite.
    """
    ids = (
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if isinstance(text, str)
        else text
    )
    ids = torch.tensor(ids[:max_tokens])
    window = min(window, len(ids))
    stride = window if stride is None else min(stride, window)
    if window < 2 or stride < 1:
        raise CalibrationError(
            f"nothing to predict: {len(ids)} tokens, window {window}, stride {stride}; the minimum is "
            "2, 2 and 1"
        )
    spans = _spans(len(ids), window, stride)
    total, count = 0.0, 0
    for start in range(0, len(spans), batch_size):
        batch = spans[start : start + batch_size]
        # The last window can be shorter than the others: it then gets a forward of its own.
        for equally_long in _by_length(batch):
            nll, tokens = _score(model, ids, equally_long)
            total, count = total + nll, count + tokens
        if progress is not None:
            progress(min(1.0, (start + len(batch)) / len(spans)))
    return Perplexity(math.exp(total / count), count, window, stride)


class _Span(NamedTuple):
    """A window: tokens begin … end - 1, of which those from `first` on are counted."""

    begin: int
    first: int
    end: int


def _spans(length: int, window: int, stride: int) -> list[_Span]:
    """Returns all windows of a text of `length` tokens that have a token to count."""
    spans, counted = [], 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        first = max(counted, begin + 1)
        if end > first:
            spans.append(_Span(begin, first, end))
        counted = end
        if end == length:
            break
    return spans


def _by_length(spans: list[_Span]) -> list[list[_Span]]:
    groups: dict[int, list[_Span]] = {}
    for span in spans:
        groups.setdefault(span.end - span.begin, []).append(span)
    return list(groups.values())


@torch.no_grad()
def _score(model: Any, ids: torch.Tensor, spans: list[_Span]) -> tuple[float, int]:
    """Returns the summed negative log-likelihood of the counted tokens, and their number.

    Args:
        model: transformers causal language model.
        ids: int64 [tokens], the text.
        spans: windows of equal length, for one forward.
    """
    inputs = torch.stack([ids[begin:end] for begin, _, end in spans]).to(model.device)
    with cpu_half_matmul(), foreign_errors(f"{type(model).__name__} fails on the evaluation text"):
        logits = model(input_ids=inputs, use_cache=False).logits
    total, count = 0.0, 0
    for row, (begin, first, end) in enumerate(spans):
        # Position p predicts token p + 1.
        predictions = logits[row, first - 1 - begin : end - 1 - begin].float()
        nll = functional.cross_entropy(predictions, inputs[row, first - begin :], reduction="none")
        total += float(nll.double().sum())
        count += end - first
    if not math.isfinite(total):
        raise NumericalError("the model's output is NaN or infinite")
    return total, count
