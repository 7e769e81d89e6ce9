"""Values of quantization configs in every spelling that tools write, and those that are refused."""

from __future__ import annotations

import time
from typing import Any

import pytest

from roundwise.checkpoint.config_values import check_pattern, flag, matches, whole_number, word
from roundwise.errors import CheckpointError


@pytest.mark.parametrize(
    ("value", "expected"), [(4, 4), ("4", 4), (" 4 ", 4), (4.0, 4), ("-1", -1), (None, None)]
)
def test_whole_numbers(value: Any, expected: int | None) -> None:
    assert whole_number({"bits": value}, "bits") == expected


@pytest.mark.parametrize("value", [True, "x", "4.5", 4.5, [4], {}, float("inf"), float("nan"), ""])
def test_what_is_not_a_whole_number(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config says bits=.*: it must be a whole number"):
        whole_number({"bits": value}, "bits")


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, True), ("True", True), (1, True), ("1", True), ("FALSE", False), (0, False), (None, None)],
)  # fmt: skip
def test_truth_values(value: Any, expected: bool | None) -> None:
    assert flag({"sym": value}, "sym") is expected


@pytest.mark.parametrize("value", ["yes", 2, [], 1.5])
def test_what_is_not_a_truth_value(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"sym=.*: it must be true or false"):
        flag({"sym": value}, "sym")


def test_words_have_one_value_under_two_names() -> None:
    assert word({"format": " GPTQ_v2"}, "checkpoint_format", "gptq") == "gptq_v2"
    assert word({"format": None, "checkpoint_format": ""}, "checkpoint_format", "gptq") == "gptq"
    with pytest.raises(CheckpointError, match="both checkpoint_format='a' and format='b': remove"):
        word({"format": "b", "checkpoint_format": "a"}, "checkpoint_format", "gptq")
    with pytest.raises(CheckpointError, match="format='3': it must be a text"):
        word({"format": 3}, "checkpoint_format", "gptq")


def test_patterns_match_from_the_start() -> None:
    assert matches(r"model\.layers", "model.layers.0") and not matches("layers", "model.layers.0")


@pytest.mark.parametrize("pattern", ["(", "*", "a{2,1}", "(?P<n>", "[", "\\", "(?<=a+*)"])
def test_patterns_that_are_not_any(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="which is not a regular expression"):
        check_pattern(pattern)


def test_a_pattern_ends_in_time() -> None:
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match="takes too long on 'aaaa"):
        matches(r"(a|aa)+$|(.*a){20}x", "a" * 3000 + "b")
    assert time.monotonic() - begun < 5
