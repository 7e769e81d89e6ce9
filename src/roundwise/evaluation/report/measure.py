"""Measures what a report adds to the facts in the files, by running the original and the checkpoint."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from roundwise.evaluation.compare import Comparison, Protocol, compare, round_to_nearest_like
from roundwise.evaluation.perplexity import cut_windows
from roundwise.evaluation.report.facts import Answers, Evaluation, ModelMetrics
from roundwise.inference.generation import generate
from roundwise.inference.load import load, require_tokenizer
from roundwise.inference.prompts import encode_text
from roundwise.inference.sampling import Sampling


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
        model: folder or hub id of the original.
        folder: folder of the checkpoint.
        protocol: evaluation protocol; it needs a text.
        text: name of the text.
        progress: called with the current step and the finished part of it, 0 … 1.

    Raises:
        CalibrationError: the text is too short.
        CheckpointError: a model cannot be loaded.
        ConfigError: roundwise cannot round with the settings of the checkpoint.
        NumericalError: the output of a model is NaN or infinite.
    """
    with tempfile.TemporaryDirectory() as scratch:
        rounded = Path(scratch) / "rounded to nearest"
        round_to_nearest_like(model, folder, rounded)
        comparisons = compare(model, [folder, rounded], protocol, progress=progress)
    first = comparisons[0]
    assert first.perplexity is not None, "the protocol has a text"
    used = cut_windows(protocol.ids, protocol.window, protocol.stride, protocol.special)
    description = (
        f"{text}: {len(protocol.ids):,} tokens, windows of {used.window:,}, stride {used.stride:,}"
    )
    original = ModelMetrics(
        name="original",
        perplexity=first.perplexity.base,
        kl_divergence=0.0,
        top1_agreement=1.0,
        bytes=first.bytes.base,
    )
    return Evaluation(
        text=description,
        models=[original, *map(_metrics, comparisons)],
        verdict=str(first.verdict),
        warnings=first.warnings,
    )


def _metrics(comparison: Comparison) -> ModelMetrics:
    """Returns the metrics of the quantized model of a comparison on a text."""
    assert comparison.perplexity is not None
    assert comparison.kl_divergence is not None
    assert comparison.top1_agreement is not None
    return ModelMetrics(
        name=comparison.name,
        perplexity=comparison.perplexity.quantized,
        kl_divergence=comparison.kl_divergence,
        top1_agreement=comparison.top1_agreement,
        bytes=comparison.bytes.quantized,
        kl_by_position=comparison.kl_by_position,
    )


def generate_answers(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    prompts: list[str],
    *,
    tokens: int = 64,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
) -> list[Answers]:
    """Generates the answers of both models to prompts, with one model in memory at a time.

    Args:
        model: folder or hub id of the original.
        folder: folder of the checkpoint.
        prompts: texts to continue.
        tokens: most tokens of an answer.
        dtype, device: as for `roundwise.load`.

    Raises:
        CheckpointError: a model cannot be loaded or has no tokenizer.
        ConfigError: a prompt is empty.
    """
    if not prompts:
        return []
    by_model = []
    for name in (model, folder):
        loaded, tokenizer = load(name, dtype=dtype, device=device)
        require_tokenizer(tokenizer, name)
        by_model.append([greedy_answer(loaded, tokenizer, prompt, tokens) for prompt in prompts])
    return [Answers(*texts) for texts in zip(prompts, *by_model, strict=True)]


def greedy_answer(model: Any, tokenizer: Any, prompt: str, tokens: int = 64) -> str:
    """Returns a model's answer to a prompt, by greedy decoding.

    Args:
        model: transformers causal language model.
        tokenizer: its tokenizer.
        prompt: text to continue.
        tokens: most tokens of the answer.
    """
    return generate(model, tokenizer, encode_text(tokenizer, prompt), Sampling(tokens)).text
