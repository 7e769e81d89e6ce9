"""Perplexity of a model through the server that serves it, and its divergence from another model.

The windows are those of `evaluation.perplexity`, so both numbers are equal where the arithmetic is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from roundwise.errors import NumericalError
from roundwise.evaluation.endpoint.client import Endpoint
from roundwise.evaluation.endpoint.prompt_scores import PromptScorer, TokenScore
from roundwise.evaluation.perplexity import Span, Windows, predictions


@dataclass(frozen=True)
class ServedDivergence:
    """Divergence of a served model from a model in this process, on the same tokens."""

    model: str
    """Name of the model in this process."""
    perplexity: float
    """Its perplexity."""
    kl_divergence: float
    """KL(model || served) per token in nats, over the served model's most likely tokens and all others
    together: a lower bound."""
    top1_agreement: float
    """Share of tokens, 0 … 1, for which both predict the same token."""
    listed_probability: float
    """Mean probability of the tokens that the server lists; near 1, the bound is tight."""


@dataclass(frozen=True)
class ServedPerplexity:
    """Perplexity of a model through the server that serves it."""

    endpoint: str
    """Address of the server."""
    model: str
    """Name of its model."""
    scored_by: str
    """The way that gave the log probabilities: prompt_logprobs, echo or n_probs."""
    perplexity: float
    tokens: int
    """Number of predicted tokens."""
    window: int
    stride: int
    against: ServedDivergence | None = None
    """Divergence from another model; None: there is none."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the JSON of `eval --endpoint --json`."""
        return asdict(self)


class Reference(NamedTuple):
    """A model in this process that the served model is compared with."""

    name: str
    model: Any
    """transformers causal language model."""


def served_perplexity(
    endpoint: Endpoint,
    tokenizer: Any,
    windows: Windows,
    *,
    parallel: int = 4,
    against: Reference | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> ServedPerplexity:
    """Measures the perplexity of a model through the server that serves it.

    Args:
        endpoint: the server.
        tokenizer: tokenizer of its model.
        windows: the text, cut into windows.
        parallel: windows that are requested at the same time.
        against: original model, or the same model in this process.
        progress: called with the finished part, 0 … 1.

    Raises:
        NumericalError: the server gives a token no probability, or the output of `against` is NaN.
        RunError: the server fails, or gives no log probabilities of prompts.
    """
    scorer = PromptScorer(endpoint, tokenizer, windows.row(windows.spans[0]))
    logprobs: list[float] = []
    compared: list[_TokenDivergence] = []
    for number, (span, scores) in enumerate(_scores(scorer, windows, parallel), start=1):
        logprobs += [score.logprob for score in scores]
        if against is not None:
            compared += _compare(against.model, windows, span, scores)
        progress(number / len(windows.spans))
    return ServedPerplexity(
        endpoint=endpoint.url,
        model=endpoint.model,
        scored_by=scorer.way,
        perplexity=_perplexity(logprobs, f"the server {endpoint.url}"),
        tokens=len(logprobs),
        window=windows.window,
        stride=windows.stride,
        against=_summary(against.name, compared) if against is not None else None,
    )


def _scores(
    scorer: PromptScorer, windows: Windows, parallel: int
) -> Iterator[tuple[Span, list[TokenScore]]]:
    """Yields the windows in order with the scores of the tokens that count."""
    with ThreadPoolExecutor(parallel) as pool:
        scores = pool.map(
            lambda span: scorer.score(windows.row(span), windows.counted(span)), windows.spans
        )
        try:
            yield from zip(windows.spans, scores, strict=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _TokenDivergence(NamedTuple):
    logprob: float
    """Log probability of the token in the model of this process."""
    kl: float
    agrees: bool
    listed: float
    """Probability of the listed tokens in the served model."""


def _compare(
    model: Any, windows: Windows, span: Span, scores: list[TokenScore]
) -> list[_TokenDivergence]:
    """Compares the predictions of a window by a model in this process with those of the server."""
    [(logits, tokens)] = predictions(model, windows, [span])
    logprobs = logits.double().log_softmax(dim=-1).cpu()
    compared = []
    for row, token, score in zip(logprobs, tokens.tolist(), scores, strict=True):
        listed = torch.tensor([*score.top])
        own, served = row[listed], torch.tensor([*score.top.values()], dtype=torch.float64)
        compared.append(
            _TokenDivergence(
                float(row[token]), partial_kl(own, served), int(row.argmax()) in score.best,
                min(1.0, float(served.exp().sum())),
            )
        )  # fmt: skip
    return compared


def partial_kl(own: torch.Tensor, served: torch.Tensor) -> float:
    """Returns KL(own || served) over some tokens and one rest: what both give to all other tokens.

    Putting tokens together never raises a KL divergence, so this is a lower bound of that over the whole
    vocabulary.

    Args:
        own, served: log probabilities of the same tokens, float64.
    """
    rests = [max(1.0 - float(logprobs.exp().sum()), 0.0) for logprobs in (own, served)]
    kl = float((own.exp() * (own - served)).sum())
    if rests[0] > 0:
        # A server rounds its numbers: its rest can be zero or below where there is one.
        kl += rests[0] * math.log(rests[0] / max(rests[1], torch.finfo(torch.float32).eps))
    return kl


def _summary(name: str, compared: list[_TokenDivergence]) -> ServedDivergence:
    count = len(compared)
    return ServedDivergence(
        model=name,
        perplexity=_perplexity([token.logprob for token in compared], name),
        kl_divergence=sum(token.kl for token in compared) / count,
        top1_agreement=sum(token.agrees for token in compared) / count,
        listed_probability=sum(token.listed for token in compared) / count,
    )


def _perplexity(logprobs: list[float], source: str) -> float:
    mean = -sum(logprobs) / len(logprobs)
    if not math.isfinite(mean):
        raise NumericalError(f"{source} gives a token no probability, or one that is not a number")
    return math.exp(min(mean, 700.0))  # more would be infinite
