"""Calls that are due later. Output thread only."""

from __future__ import annotations

import heapq
import itertools
import logging
from collections.abc import Callable

from kvstore.clock import Clock

log = logging.getLogger(__name__)


class Timers:
    """A heap of calls by time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self._clock() + delay_s, next(self._order), call))

    def next_s(self) -> float | None:
        return self._heap[0][0] if self._heap else None

    def run_due(self) -> None:
        now = self._clock()
        while self._heap and self._heap[0][0] <= now:
            call = heapq.heappop(self._heap)[2]
            try:
                call()
            except Exception:
                log.exception("a timer of the output thread failed")
