"""Errors of other libraries become one sentence of ours; others are passed on."""

from __future__ import annotations

import errno

import pytest
import torch

from roundwise.errors import MAX_LINE, CheckpointError, ConfigError
from roundwise.model.foreign_errors import foreign_errors


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("no good"), "it fails: no good"),
        (KeyError("x"), "it fails: 'x'"),
        (AssertionError(), "it fails: AssertionError"),
        (RuntimeError("first\nsecond"), "it fails: first"),
        (TypeError("y" * 100_000), "it fails: " + "y" * MAX_LINE + "…"),
        (OSError("no such thing"), "it fails: no such thing"),
        (RecursionError("too deep"), "it fails: too deep"),
    ],
)
def test_any_error_is_one_sentence(error: Exception, says: str) -> None:
    with pytest.raises(CheckpointError) as raised, foreign_errors("it fails"):
        raise error
    assert str(raised.value) == says
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("ours"), MemoryError(), torch.OutOfMemoryError("gpu"), KeyboardInterrupt(),
        RuntimeError("cannot allocate memory"), OSError(errno.ENOSPC, "disk full"),
    ],
)  # fmt: skip
def test_these_are_passed_on(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, foreign_errors("it fails"):
        raise error
    assert raised.value is error
