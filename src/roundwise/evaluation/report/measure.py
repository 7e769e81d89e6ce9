"""What a report says beyond its files: the checkpoint beside its original and plain rounding."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from roundwise.errors import CheckpointError
from roundwise.evaluation.compare import Compared, Protocol, compare, round_to_nearest_like
from roundwise.evaluation.report.facts import Answers, Evaluation, Measured
from roundwise.inference.generation import Sampling, generate
from roundwise.inference.load import load
from roundwise.inference.prompts import encode_text


def evaluate(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    protocol: Protocol,
    text: str,
    *,
    progress: Callable[[str, float], None] = lambda _what, _done: None,
) -> Evaluation:
    """Compares a checkpoint, and its original rounded to nearest, with the original.

    Args:
        model: the original.
        folder: the checkpoint.
        protocol: how (see `compare`), with a text.
        text: what the text is called.
        progress: as for `compare`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        rounded = Path(scratch) / "rounded to nearest"
        round_to_nearest_like(model, folder, rounded)
        found = compare(model, [folder, rounded], protocol, progress=progress)
    first = found[0]
    assert first.perplexity is not None, "a text was given"
    how = (
        f"{len(protocol.ids):,} tokens, windows of {protocol.window:,}, stride {protocol.stride:,}"
    )
    return Evaluation(
        text=f"{text}: {how}",
        models=[
            Measured("original", first.perplexity[0], 0.0, 1.0, first.bytes[0]),
            *(_measured(one) for one in found),
        ],
        verdict=first.verdict,
        warnings=first.warnings,
    )


def _measured(one: Compared) -> Measured:
    assert one.perplexity is not None
    assert one.kl_divergence is not None
    assert one.top1_agreement is not None
    return Measured(
        one.name, one.perplexity[1], one.kl_divergence, one.top1_agreement, one.bytes[1],
        one.kl_by_position,
    )  # fmt: skip


def answers(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    prompts: list[str],
    *,
    tokens: int = 64,
    dtype: Any = "auto",
    device: str = "cpu",
) -> list[Answers]:
    """How both go on from prompts, one model in memory at a time.

    Raises:
        CheckpointError: a model has no tokenizer.
    """
    found = []
    for name in (model, folder) if prompts else ():
        loaded, tokenizer = load(name, dtype=dtype, device=device)
        if tokenizer is None:
            raise CheckpointError(f"{name} has no tokenizer, which prompts need")
        found.append([continued(loaded, tokenizer, prompt, tokens) for prompt in prompts])
    return [Answers(*each) for each in zip(prompts, *found, strict=True)] if found else []


def continued(loaded: Any, tokenizer: Any, prompt: str, tokens: int = 64) -> str:
    """How a model goes on from a prompt, taking the likeliest token each time."""
    return generate(loaded, tokenizer, encode_text(tokenizer, prompt), Sampling(tokens)).text
