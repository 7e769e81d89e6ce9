"""Turns errors of transformers, tokenizers and a model's own code into ours: one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
    except (RoundwiseError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error) or (isinstance(error, OSError) and error.errno):
            raise
        reason = first_line(error)
        raise CheckpointError(f"{what}: {reason or type(error).__name__}") from error
