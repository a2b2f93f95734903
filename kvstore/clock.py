"""Clocks. Decisions take one, so that tests and the planner run them in virtual time."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]  # monotonic seconds


def now_s() -> float:
    """Monotonic seconds, for durations. Never compare with another host's."""
    return time.monotonic()


class VirtualClock:
    """A clock that moves only when told. Owned by a test or the simulator."""

    def __init__(self, start_s: float = 0.0) -> None:
        self.now = start_s

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
