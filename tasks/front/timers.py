"""Calls that are due later, and calls on the state server that are repeated until it answers. Output thread only."""

from __future__ import annotations

import heapq
import itertools
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from kvstore.clock import Clock
from kvstore.errors import KVStoreError, StateUnavailable

log = logging.getLogger(__name__)

T = TypeVar("T")
RETRY_FIRST_S = 0.05
RETRY_MAX_S = 0.5


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


@dataclass(frozen=True)
class _Call:
    what: str
    call: Callable[[], Any]
    on_reply: Callable[[Any], None]
    on_error: Callable[[KVStoreError], None] | None


class RepeatedCalls:
    """Calls on the state server, in order, each until it is answered.

    Every function there is safe to repeat with the same arguments, so no reply is no problem: the call stays at the
    head of the queue and goes out again. Nobody blocks meanwhile: while the server is away, nothing is tried but the
    head, with back-off.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._queue: deque[_Call] = deque()
        self._retry_s = 0.0  # current back-off
        self._retry_at_s = 0.0
        self._is_running = False

    def __len__(self) -> int:
        return len(self._queue)

    def do(
        self,
        what: str,
        call: Callable[[], T],
        on_reply: Callable[[T], None],
        on_error: Callable[[KVStoreError], None] | None = None,
    ) -> None:
        """Call now, or in turn. `on_error`: the server answered, with something that repeating cannot mend."""
        self._queue.append(_Call(what, call, on_reply, on_error))
        self.run()

    def next_s(self) -> float | None:
        return self._retry_at_s if self._queue else None

    def run(self) -> None:
        """Work off what is due. Replies may queue further calls."""
        if self._is_running:
            return
        self._is_running = True
        try:
            while self._queue and self._clock() >= self._retry_at_s:
                if not self._try(self._queue[0]):
                    return
        finally:
            self._is_running = False

    def _try(self, head: _Call) -> bool:
        try:
            reply = head.call()
        except StateUnavailable:
            self._retry_s = min(max(2 * self._retry_s, RETRY_FIRST_S), RETRY_MAX_S)
            self._retry_at_s = self._clock() + self._retry_s
            return False
        except KVStoreError as error:
            self._queue.popleft()
            log.error("%s failed: %s", head.what, error)
            if head.on_error is not None:
                head.on_error(error)
            return True
        self._queue.popleft()
        self._retry_s = self._retry_at_s = 0.0
        try:
            head.on_reply(reply)
        except Exception:
            log.exception("handling the reply of %s failed", head.what)
        return True
