"""Admission, stage 1: who is refused before a byte of the body is read. Pure: takes a clock, asks nobody.

What was accepted keeps its latency, so a gateway takes only as many calls as it has threads for, and none for a cluster
that has no worker.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Final

from kvstore.clock import Clock
from webapp.errors import Overloaded

# Threads that stay free for health, metrics and cancels while every call waits for tokens.
RESERVED_THREADS: Final = 16
NO_WORKER_S: Final = 30.0


class Admission:
    """Counts calls in work. Thread-safe."""

    def __init__(self, *, limit: int, clock: Clock, jitter: Callable[[], float] = random.random) -> None:
        self.limit = limit
        self._clock = clock
        self._jitter = jitter
        self._num_open = 0
        self._lock = threading.Lock()
        self._worker_seen_s = clock()
        self.is_draining = False

    @property
    def num_open(self) -> int:
        return self._num_open

    def worker_seen(self) -> None:
        """A live worker was in the registry just now, or the registry could not be asked."""
        self._worker_seen_s = self._clock()

    def admit(self) -> None:
        """Takes a place; `leave` gives it back.

        Raises:
            Overloaded: draining, no worker for 30 s, or no place.
        """
        if self.is_draining:
            raise self._refusal("draining", "this gateway is shutting down; another one takes new requests", 1)
        if self._clock() - self._worker_seen_s > NO_WORKER_S:
            message = f"no worker has been seen for {NO_WORKER_S:g} s; start one, or try again later"
            raise self._refusal("not_ready", message, 5)
        with self._lock:
            if self._num_open >= self.limit:
                message = f"{self.limit} requests are in work here, which is the limit; try again later"
                raise self._refusal("overloaded", message, 1)
            self._num_open += 1

    def leave(self) -> None:
        with self._lock:
            self._num_open -= 1

    def _refusal(self, code: str, message: str, base_s: int) -> Overloaded:
        return Overloaded(code, message, retry_after_s=base_s + round(self._jitter() * base_s))
