"""Saying again what has ended: a failover may have lost the end that a client already has.

After any terminal event the gateway cancels the request after 1, 2 and 4 s: a record that has its end answers FINAL and
nothing changes; one that lost it ends now, instead of running for nobody.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Callable
from typing import Final

from kvstore.clock import Clock, now_s
from kvstore.errors import KVStoreError, StateUnavailable

_log = logging.getLogger(__name__)

AFTER_S: Final = (1.0, 2.0, 4.0)


class Settler:
    """Thread `settler`: calls things later. Pure but for its thread: `due(now)` gives what is due."""

    def __init__(self, cancel: Callable[[str, str], object], *, clock: Clock = now_s) -> None:
        self._cancel = cancel
        self._clock = clock
        self._queue: list[tuple[float, int, str, str]] = []
        self._number = itertools.count()
        self._changed = threading.Condition(threading.Lock())
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="settler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=3.0)

    def settle(self, rid: str, reason: str) -> None:
        """Cancel `rid` with `reason` 1, 2 and 4 s from now."""
        with self._changed:
            for after_s in AFTER_S:
                heapq.heappush(self._queue, (self._clock() + after_s, next(self._number), rid, reason))
            self._changed.notify()

    def due(self) -> list[tuple[str, str]]:
        """Takes what is due now."""
        due: list[tuple[str, str]] = []
        with self._changed:
            while self._queue and self._queue[0][0] <= self._clock():
                due.append(heapq.heappop(self._queue)[2:])
        return due

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._is_stopped:
                    return
                wait_s = self._queue[0][0] - self._clock() if self._queue else 60.0
                if wait_s > 0:
                    self._changed.wait(wait_s)
            for rid, reason in self.due():
                try:
                    self._cancel(rid, reason)
                except StateUnavailable:
                    continue  # one of its later calls will be answered, or the record ends by its deadline
                except KVStoreError as error:
                    _log.warning("request %s: its end could not be settled: %s", rid, error)
                except Exception:
                    _log.exception("request %s: its end could not be settled", rid)
