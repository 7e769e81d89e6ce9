"""Divergence of two models, against a direct computation in float64."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.calibration.special_tokens import SpecialTokens
from roundwise.errors import CalibrationError, NumericalError
from roundwise.evaluation.divergence import divergence
from tests.helpers import windows

IDS = [token for window in windows(count=4, length=32) for token in window]


@pytest.fixture(scope="module")
def models(llama: Path) -> tuple[Any, Any]:
    """A model, and the same with other weights in its head."""
    base, _ = rw.load(llama, dtype=torch.float32)
    other = copy.deepcopy(base)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(other.lm_head.weight.shape, generator=generator)
        other.lm_head.weight += 0.05 * noise
    return base, other


@torch.no_grad()
@pytest.mark.parametrize(("window", "batch_size"), [(16, 3), (32, 1), (40, 4)])
def test_equals_a_direct_computation(models: tuple[Any, Any], window: int, batch_size: int) -> None:
    count = len(IDS) // window
    result = divergence(*models, IDS, window=window, batch_size=batch_size)
    inputs = torch.tensor(IDS[: count * window]).view(count, window)
    p, q = (model(inputs).logits.double().log_softmax(-1) for model in models)
    kl = (p.exp() * (p - q)).sum(-1)
    assert result.kl_divergence == pytest.approx(float(kl.mean()), rel=1e-4)
    assert result.kl_by_position == pytest.approx(kl.mean(0).tolist(), rel=1e-4)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert 0 < agreement < 1
    assert result.top1_agreement == pytest.approx(float(agreement))
    for log, perplexity in zip((p, q), result.perplexity, strict=True):
        nll = -log[:, :-1].gather(-1, inputs[:, 1:, None]).mean()
        assert perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert result.tokens == count * window


@torch.no_grad()
@pytest.mark.parametrize(("prefix", "suffix"), [((1,), ()), ((1, 2), (3,)), ((), (3,))])
def test_special_tokens_are_context(
    models: tuple[Any, Any], prefix: tuple[int, ...], suffix: tuple[int, ...]
) -> None:
    special = SpecialTokens(prefix, suffix)
    result = divergence(*models, IDS, window=12 + special.count, special=special)
    count, begin = len(IDS) // 12, len(prefix)
    rows = [[*prefix, *IDS[i * 12 : (i + 1) * 12], *suffix] for i in range(count)]
    inputs = torch.tensor(rows)
    p, q = (model(inputs).logits.double().log_softmax(-1) for model in models)
    kl = (p.exp() * (p - q)).sum(-1)[:, begin : begin + 12]
    assert result.tokens == count * 12
    assert result.kl_by_position == pytest.approx(kl.mean(0).tolist(), rel=1e-4)
    # What is in front of the first token predicts it; without anything it is not predicted.
    first = max(begin, 1)
    targets = inputs[:, first : begin + 12, None]
    nll = -p[:, first - 1 : begin + 11].gather(-1, targets).mean()
    assert result.perplexity[0] == pytest.approx(math.exp(nll), rel=1e-5)


def test_a_model_does_not_differ_from_itself(models: tuple[Any, Any]) -> None:
    result = divergence(models[0], models[0], IDS, window=32)
    assert result.kl_divergence == 0
    assert result.top1_agreement == 1
    assert result.perplexity[0] == result.perplexity[1]


def test_progress_ends_at_one(models: tuple[Any, Any]) -> None:
    parts: list[float] = []
    divergence(*models, IDS, window=32, batch_size=3, progress=parts.append)
    assert parts == [0.75, 1.0]


@pytest.mark.parametrize(("ids", "window"), [(IDS[:31], 32), ([], 32), (IDS, 1)])
def test_too_few_tokens_are_refused(models: tuple[Any, Any], ids: list[int], window: int) -> None:
    with pytest.raises(CalibrationError, match=f"too few for a window of {window}"):
        divergence(*models, ids, window=window)


def test_nan_is_an_error(models: tuple[Any, Any]) -> None:
    broken = copy.deepcopy(models[1])
    with torch.no_grad():
        broken.model.norm.weight[3] = torch.nan
    with pytest.raises(NumericalError, match="NaN or infinite"):
        divergence(models[0], broken, IDS, window=32)
