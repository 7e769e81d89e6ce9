"""Versions and hardware of a run, and the words for where two of them differ."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import roundwise as rw
from roundwise.run.environment import (
    LIBRARIES,
    describe_difference,
    numeric_environment,
    platform_info,
    torch_threads,
)
from roundwise.system.device import HOST


def test_what_the_last_bits_depend_on() -> None:
    environment = numeric_environment(HOST)
    assert environment["device"] == "cpu"
    assert environment["threads"] == torch.get_num_threads()
    assert environment["processor"] == torch.backends.cpu.get_cpu_capability()
    assert environment["versions"] == {
        "roundwise": rw.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def test_the_solvers_backend_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from roundwise.core.backends import cpp

    monkeypatch.setattr(cpp, "load", lambda: (None, cpp.Status(None, "switched off")))
    assert numeric_environment(HOST)["solver"] == "torch"
    monkeypatch.setattr(cpp, "load", lambda: (None, cpp.Status("avx2", "")))
    assert numeric_environment(HOST)["solver"] == "avx2"


def test_the_platform_is_plain_json_and_does_not_change() -> None:
    platform = platform_info()
    assert json.loads(json.dumps(platform)) == platform
    assert platform == platform_info()
    assert platform["python"].startswith("CPython 3.")
    assert platform["ranks"] == 1
    assert tuple(platform["libraries"]) == LIBRARIES
    assert platform["features"] == sorted(platform["features"])


@pytest.mark.parametrize(
    ("old", "new", "description"),
    [
        ({"a": 1}, {"a": 1}, ""),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, "b (2 -> 3)"),
        ({"a": {"b": 1, "c": "x"}}, {"a": {"b": 2, "c": "y"}}, "a.b (1 -> 2), a.c (x -> y)"),
        ({"a": 1}, {"b": 1}, "a (1 -> none), b (none -> 1)"),
        ({"a": "1" * 30}, {"a": "2" * 30}, "a"),  # too long to print
        ({"a": "1" * 30}, {"a": "2"}, "a (… -> 2)"),
        ({"a": {"b": 1}}, {"a": None}, "a ({'b': 1} -> None)"),
    ],
)
def test_differences_in_words(old: object, new: object, description: str) -> None:
    assert describe_difference(old, new) == description


def test_differences_are_named_below_a_path() -> None:
    assert (
        describe_difference({"seed": 0}, {"seed": 1}, "calibration") == "calibration.seed (0 -> 1)"
    )


def test_the_number_of_threads_is_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ValueError
    assert torch.get_num_threads() == before
