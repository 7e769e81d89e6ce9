"""The tree of errors in the module's docstring is the tree of the classes."""

from __future__ import annotations

import re

import pytest

import roundwise as rw
from roundwise import errors

CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, Exception)
}


def drawn() -> dict[str, str]:
    """Returns the parent of each class in the drawing."""
    parents, path = {}, ["RoundwiseError"]
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ([│ ]*)[├└]── (\w+)", line)
        if match:
            depth = len(match[1]) // 4 + 1
            path[depth:] = [match[2]]
            parents[match[2]] = path[depth - 1]
    return parents


def test_the_drawing() -> None:
    assert drawn() == {
        name: kind.__mro__[1].__name__ for name, kind in CLASSES.items() if name != "RoundwiseError"
    }


@pytest.mark.parametrize(("name", "kind"), CLASSES.items())
def test_exit_codes(name: str, kind: type[errors.RoundwiseError]) -> None:
    """2: nothing was started; 1: the work failed."""
    assert kind.exit_code == (2 if issubclass(kind, errors.UsageError) else 1), name


def test_one_class_catches_all() -> None:
    assert all(issubclass(kind, rw.RoundwiseError) for kind in CLASSES.values())


def test_texts_of_a_checkpoint_are_quoted_short_and_without_control_characters() -> None:
    assert errors.quoted("a b") == "'a b'"
    assert errors.quoted("\x1b[2J\n\u202e") == r"'\x1b[2J\n\u202e'"
    assert errors.quoted("x" * 100_000) == repr("x" * errors.MAX_QUOTED + "…")
