"""The C++ extension with one instruction set or another, or switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from roundwise.core.backends import cpp

module, status = cpp.load()
SETS = module.instruction_sets() if module else []
needs_native = pytest.mark.skipif(
    module is None, reason=f"needs the native extension: {status.reason}"
)


@contextmanager
def using(name: str | None) -> Iterator[None]:
    """Computes with one instruction set, or with plain torch (None)."""
    if name is None:
        loaded, cpp.load = cpp.load, lambda: (None, cpp.Status(None, "test"))
        try:
            yield
        finally:
            cpp.load = loaded
        return
    module.use(name)
    try:
        yield
    finally:
        module.use(SETS[0])
