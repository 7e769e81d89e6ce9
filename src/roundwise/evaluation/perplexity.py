"""Perplexity over a long text in sliding windows, as the WikiText-2 recipe of transformers does it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from roundwise.errors import CalibrationError, NumericalError
from roundwise.system.half_matmul import cpu_half_matmul


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood per predicted token."""

    perplexity: float
    tokens: int
    """Tokens that were predicted; the first of a window has nothing to be predicted from."""
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
    """Perplexity of a causal language model on a text.

    Windows start every `stride` tokens; in each, only tokens that no earlier window has predicted
    count, all the others are context. With stride = window there is no overlap and the first token
    of each window is not predicted.

    Args:
        model: transformers causal language model.
        tokenizer: its tokenizer; not used when `text` is a list of token ids.
        text: one long text or its token ids; only the first `max_tokens` tokens are used.
        window: tokens the model sees at once.
        stride: 1 … window; the default is the window.
        batch_size: windows that go through the model together.
        progress: called with the finished part, 0 … 1.

    Raises:
        CalibrationError: fewer than two tokens, or a window or stride that cannot be.
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
            f"{len(ids)} tokens, window {window}, stride {stride}: nothing to predict"
        )
    spans = _spans(len(ids), window, stride)
    total, count = 0.0, 0
    for start in range(0, len(spans), batch_size):
        part = spans[start : start + batch_size]
        # All but the last window are equally long; the last goes alone if it is shorter.
        for same in _by_length(part):
            nll, tokens = _score(model, ids, same)
            total, count = total + nll, count + tokens
        if progress is not None:
            progress(min(1.0, (start + len(part)) / len(spans)))
    return Perplexity(math.exp(total / count), count, window, stride)


def _spans(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first counted target, end) of each window."""
    spans, counted = [], 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        if end - max(counted, begin + 1) > 0:
            spans.append((begin, max(counted, begin + 1), end))
        counted = end
        if end == length:
            break
    return spans


def _by_length(spans: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    groups: dict[int, list[tuple[int, int, int]]] = {}
    for begin, first, end in spans:
        groups.setdefault(end - begin, []).append((begin, first, end))
    return list(groups.values())


@torch.no_grad()
def _score(model: Any, ids: torch.Tensor, spans: list[tuple[int, int, int]]) -> tuple[float, int]:
    """Summed negative log-likelihood and number of the targets that count."""
    inputs = torch.stack([ids[begin:end] for begin, _, end in spans]).to(model.device)
    with cpu_half_matmul():
        logits = model(input_ids=inputs, use_cache=False).logits
    total, count = 0.0, 0
    for row, (begin, first, end) in enumerate(spans):
        # Position p predicts token p + 1.
        predicting = logits[row, first - 1 - begin : end - 1 - begin].float()
        nll = functional.cross_entropy(predicting, inputs[row, first - begin :], reduction="none")
        total += float(nll.double().sum())
        count += end - first
    if not math.isfinite(total):
        raise NumericalError("the model's output is NaN or infinite")
    return total, count
