"""PhaseTimer: seconds of a run by phase.

Time inside a nested phase counts for that phase only, so all phases add up to the whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from roundwise.system.device import HOST, synchronize


class PhaseTimer:
    """Adds up seconds by phase name. Not thread-safe: a run does all its work on one thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open_phases: list[str] = []
        self._lap_start = 0.0
        self.device = HOST
        """Device that computes: it is synchronized where a phase begins and ends."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context manager: counts the time of its body for `name`, not for the enclosing phase."""
        self._lap()
        self._open_phases.append(name)
        try:
            yield
        finally:
            self._lap()
            self._open_phases.pop()

    def add(self, name: str, seconds: float) -> None:
        """Adds time that was measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _lap(self) -> None:
        """Adds the time since the last call to the innermost open phase."""
        if self.device.type != "cpu":
            synchronize(self.device)
        now = time.perf_counter()
        if self._open_phases:
            self.add(self._open_phases[-1], now - self._lap_start)
        self._lap_start = now

    def take(self) -> dict[str, float]:
        """Returns the seconds by phase since the last call, and resets them."""
        seconds, self.seconds = self.seconds, {}
        return seconds


#: The timer of this process.
timer = PhaseTimer()
