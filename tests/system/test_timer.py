"""Seconds by phase: each moment counts once, for the innermost phase."""

from __future__ import annotations

import pytest
import torch

from roundwise.system import timer as timer_module
from roundwise.system.timer import PhaseTimer


class Clock:
    """A clock that tests move forward."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timer_module, "time", clock)
    return clock


def test_a_nested_phase_is_not_counted_in_the_outer_one(clock: Clock) -> None:
    timer = PhaseTimer()
    clock.now += 5.0  # outside of all phases
    with timer.phase("solve"):
        clock.now += 1.0
        with timer.phase("factor"):
            clock.now += 10.0
        clock.now += 2.0
    clock.now += 5.0
    assert timer.seconds == {"solve": 3.0, "factor": 10.0}


def test_a_phase_ends_when_its_body_fails(clock: Clock) -> None:
    timer = PhaseTimer()
    with pytest.raises(ValueError), timer.phase("solve"):
        clock.now += 1.0
        raise ValueError
    clock.now += 5.0
    with timer.phase("pack"):
        clock.now += 2.0
    assert timer.seconds == {"solve": 1.0, "pack": 2.0}


def test_take_resets(clock: Clock) -> None:
    timer = PhaseTimer()
    timer.add("start", 4.0)
    with timer.phase("start"):
        clock.now += 1.0
    assert timer.take() == {"start": 5.0}
    assert timer.take() == {}


def test_the_device_is_synchronized_where_a_phase_begins_and_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    synchronized: list[torch.device] = []
    monkeypatch.setattr(timer_module, "synchronize", synchronized.append)
    timer = PhaseTimer()
    timer.device = torch.device("meta")
    with timer.phase("forward"):
        assert len(synchronized) == 1
    assert synchronized == [torch.device("meta")] * 2
