"""Turns errors of transformers, tokenizers and a model's own code into ours: one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from roundwise.errors import CheckpointError, RoundwiseError, first_line


@contextmanager
def foreign_errors(what: str) -> Iterator[None]:
    """Context manager: an error of other code that runs inside becomes a `CheckpointError`.

    A file of a checkpoint can make other libraries raise any type; all mean that the checkpoint cannot
    be used. Lack of memory, a failed disk and our own errors are passed on.

    Args:
        what: the thing that fails and what is being done with it, such as "X cannot be loaded".

    Raises:
        CheckpointError: what failed, and the first line of the other error.
    """
    try:
        yield
    except Exception as error:
        raise_foreign(error, what)


def raise_foreign(error: Exception, what: str) -> NoReturn:
    """Raises an error as `foreign_errors` does, for code that runs too often for a context manager."""
    passed_on = (
        isinstance(error, RoundwiseError | MemoryError | torch.OutOfMemoryError)
        or (isinstance(error, OSError) and error.errno)
        or "allocate memory" in str(error)
    )
    if passed_on:
        raise error
    reason = first_line(error)
    raise CheckpointError(f"{what}: {reason or type(error).__name__}") from error
