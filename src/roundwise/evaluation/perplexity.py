"""Perplexity of a long text in sliding windows, as in the WikiText-2 example of transformers' docs."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    ids = (
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if isinstance(text, str)
        else text
    )
    ids = torch.tensor(ids[:max_tokens])
    around = special_tokens(tokenizer) if special is None else special
    size = min(window - around.count, len(ids))  # tokens of the text in a window
    window = size + around.count
    stride = size if stride is None else min(stride, size)
    first = 0 if around.prefix else 1
    if size <= first or stride < 1:
        raise CalibrationError(
            f"nothing to predict: {len(ids)} tokens, window {window}, stride {stride}; the minimum is "
            f"{first + 1}, {around.count + first + 1} and 1"
        )
    spans = _spans(len(ids), size, stride, first)
    total, count = 0.0, 0
    for start in range(0, len(spans), batch_size):
        batch = spans[start : start + batch_size]
        # The last window can be shorter than the others: it then gets a forward of its own.
        for equally_long in _by_length(batch):
            nll, tokens = _score(model, ids, equally_long, around)
            total, count = total + nll, count + tokens
        if progress is not None:
            progress(min(1.0, (start + len(batch)) / len(spans)))
    return Perplexity(math.exp(total / count), count, window, stride)


class _Span(NamedTuple):
    """A window: tokens begin … end - 1 of the text, of which those from `first` on are counted."""

    begin: int
    first: int
    end: int


def _spans(length: int, size: int, stride: int, unpredicted: int) -> list[_Span]:
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
def _score(
    model: Any, ids: torch.Tensor, spans: list[_Span], special: SpecialTokens
) -> tuple[float, int]:
    """Returns the summed negative log-likelihood of the counted tokens, and their number.

    Args:
        model: transformers causal language model.
        ids: int64 [tokens], the text.
        spans: windows of equal length, for one forward.
        special: special tokens around every window.
    """
    rows = [special.around(ids[begin:end].tolist()) for begin, _, end in spans]
    inputs, prefix = torch.tensor(rows, device=model.device), len(special.prefix)
    with cpu_half_matmul(), foreign_errors(f"{type(model).__name__} fails on the evaluation text"):
        logits = model(input_ids=inputs, use_cache=False).logits
    total, count = 0.0, 0
    for row, (begin, first, end) in enumerate(spans):
        counted = slice(prefix + first - begin, prefix + end - begin)
        # Position p predicts token p + 1.
        predictions = logits[row, counted.start - 1 : counted.stop - 1].float()
        nll = functional.cross_entropy(predictions, inputs[row, counted], reduction="none")
        total += float(nll.double().sum())
        count += end - first
    if not math.isfinite(total):
        raise NumericalError("the model's output is NaN or infinite")
    return total, count
