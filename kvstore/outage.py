"""Outages told in few words: one line when a server stops answering, one when it answers again, a count in between.

Many threads meet the same outage, several times a second each; a line for each failed call buries every other line.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

from kvstore.clock import Clock, now_s

REPEAT_EVERY_S: Final = 10.0


class OutageLog:
    """Thread-safe. At most one "no answer" line per `REPEAT_EVERY_S`, however often the server comes and goes.

    Args:
        what: the server, as a reader of the log knows it.
    """

    def __init__(self, log: logging.Logger, what: str, *, clock: Clock = now_s) -> None:
        self._log = log
        self._what = what
        self._clock = clock
        self._lock = threading.Lock()
        self._since_s: float | None = None  # start of the outage that was told, None: none is
        self._told_s = float("-inf")
        self._num_failed = 0

    def failed(self, call: str, reason: str) -> None:
        """`call` got no usable answer; whoever made it repeats it."""
        with self._lock:
            now = self._clock()
            self._num_failed += 1
            if now - self._told_s < REPEAT_EVERY_S:
                return
            self._told_s = now
            count, self._num_failed = self._num_failed, 0
            if self._since_s is None:
                self._since_s = now
        self._log.warning("%s: no answer to %s (%s); calls are repeated; %d failed", self._what, call, reason, count)

    def answered(self) -> None:
        """A call was answered. Costs nothing while there is no outage."""
        if self._since_s is None:
            return
        with self._lock:
            since_s, self._since_s = self._since_s, None
            count, self._num_failed = self._num_failed, 0
        if since_s is not None:
            away_s = self._clock() - since_s
            self._log.warning("%s: answers again after %.1f s; %d more calls failed", self._what, away_s, count)
