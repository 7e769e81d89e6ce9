"""Where the time of a run goes: seconds by phase, each moment counted once.

A phase inside another one takes its time away from the outer one, so the sum is the whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from roundwise.system.device import HOST, synchronize


class PhaseTimer:
    """Adds up seconds by name of phase. One thread only, as the pipeline is."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[str] = []
        self._since = 0.0
        self.device = HOST
        """Where the work is done: a phase ends when it is."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of this block for `name`, not for the phase around it."""
        self._lap()
        self._inside.append(name)
        try:
            yield
        finally:
            self._lap()
            self._inside.pop()

    def add(self, name: str, seconds: float) -> None:
        """Counts time that was measured otherwise."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _lap(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._inside:
            self.add(self._inside[-1], now - self._since)
        self._since = now

    def take(self) -> dict[str, float]:
        """What was added up since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds


#: The one that everybody uses.
timer = PhaseTimer()
