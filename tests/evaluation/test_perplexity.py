"""Perplexity equals a direct computation of a few lines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import roundwise as rw
from roundwise.calibration.sources import read_text
from roundwise.errors import CalibrationError, NumericalError
from tests.helpers import windows

TOKENS = 2_200


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Any]:
    return rw.load(tiny, dtype=torch.float32)


@pytest.fixture(scope="module")
def ids(loaded: tuple[Any, Any]) -> list[int]:
    content = read_text("python-stdlib")[: 8 * TOKENS]
    tokens = loaded[1](content, add_special_tokens=False, verbose=False)["input_ids"]
    assert len(tokens) >= TOKENS
    return tokens[:TOKENS]


@torch.no_grad()
def plain(model: Any, ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """Scores each token once, in the first window that has it, as in the example of transformers."""
    total, count, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        part = torch.tensor([ids[begin:end]])
        log_probs = model(part).logits[0, :-1].double().log_softmax(-1)
        nll = -log_probs.gather(1, part[0, 1:, None])[:, 0]
        new = min(end - previous, len(nll))
        total += float(nll[len(nll) - new :].sum())
        count += new
        previous = end
        if end == len(ids):
            break
    return math.exp(total / count), count


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("window", "stride"),
    [(512, 512), (512, 128), (2048, 128), (2048, 512), (2048, 2048), (300, 133)],
)
def test_equals_the_plain_computation(
    window: int, stride: int, loaded: tuple[Any, Any], ids: list[int]
) -> None:
    expected, count = plain(loaded[0], ids, window, stride)
    result = rw.perplexity(loaded[0], None, ids, window=window, stride=stride)
    assert result.perplexity == pytest.approx(expected, rel=1e-4)
    assert (result.tokens, result.window, result.stride) == (count, window, stride)


@pytest.mark.parametrize(
    ("length", "window", "stride", "tokens"),
    [
        (100, 100, 100, 99),  # one window: all but the first token
        (100, 200, 200, 99),  # a window longer than the text is the text
        (100, 50, 50, 98),  # no overlap: the first token of each window is lost
        (100, 50, 25, 99),  # overlap: only the very first is
        (101, 50, 50, 98),  # a last window of one token predicts nothing
        (102, 50, 50, 99),
        (100, 2, 1, 99),
    ],
)
def test_tokens_are_counted_exactly(
    length: int, window: int, stride: int, tokens: int, loaded: tuple[Any, Any], ids: list[int]
) -> None:
    result = rw.perplexity(loaded[0], None, ids[:length], window=window, stride=stride)
    assert result.tokens == tokens
    assert result.tokens == plain(loaded[0], ids[:length], result.window, result.stride)[1]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_do_not_matter(batch_size: int, loaded: tuple[Any, Any], ids: list[int]) -> None:
    one = rw.perplexity(loaded[0], None, ids[:700], window=128, stride=64, batch_size=1)
    other = rw.perplexity(loaded[0], None, ids[:700], window=128, stride=64, batch_size=batch_size)
    assert other.perplexity == pytest.approx(one.perplexity, rel=1e-5)
    assert other.tokens == one.tokens


def test_a_text_and_its_token_ids_are_equivalent(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    text = "import os\n\ndef walk(top):\n    return os.walk(top)\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert rw.perplexity(model, tokenizer, text) == rw.perplexity(model, None, ids)


def test_only_the_first_tokens_count(loaded: tuple[Any, Any], ids: list[int]) -> None:
    cut = rw.perplexity(loaded[0], None, ids, window=64, max_tokens=200)
    assert cut == rw.perplexity(loaded[0], None, ids[:200], window=64)


def test_uniform_predictions_have_the_perplexity_of_the_vocabulary(llama: Path) -> None:
    model, _ = rw.load(llama)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert rw.perplexity(model, None, windows()[0]).perplexity == pytest.approx(128, rel=1e-5)


def test_the_trained_model_has_learned_something(loaded: tuple[Any, Any], ids: list[int]) -> None:
    assert rw.perplexity(loaded[0], None, ids, window=1024, stride=512).perplexity < 60


def test_progress_ends_at_one(loaded: tuple[Any, Any], ids: list[int]) -> None:
    parts: list[float] = []
    rw.perplexity(loaded[0], None, ids[:500], window=64, progress=parts.append)
    assert parts == sorted(parts)
    assert parts[-1] == 1.0


@pytest.mark.parametrize("text", [[], [5], [5] * 10])
def test_nothing_to_predict_is_refused(text: list[int], loaded: tuple[Any, Any]) -> None:
    with pytest.raises(CalibrationError, match="nothing to predict"):
        rw.perplexity(loaded[0], None, text, window=1 if len(text) > 1 else 64)


def test_nan_is_an_error_not_a_number(llama: Path) -> None:
    model, _ = rw.load(llama)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(NumericalError, match="NaN or infinite"):
        rw.perplexity(model, None, windows()[0])
