"""See tests/exact.py."""

from tests.exact import exact

__all__ = ["exact"]
