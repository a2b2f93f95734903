"""Leases of what this worker owns, and the self-fence.

0 s ......... 1.5 s ........................ 30 s ......
renewed       publish nothing, keep the KV   drop it all: somebody else has long taken over
The engine hears of each answered renewal (`Lease`) and stops stepping by itself 5 s after the last.
"""

from __future__ import annotations

import logging

from engines.messages import Lease
from kvstore.clock import Clock
from kvstore.errors import StateUnavailable
from kvstore.state.replies import Gone
from tasks.front.context import FrontContext
from tasks.front.ends import RequestEnds
from tasks.front.publisher import Publisher
from tasks.front.requests import Phase

log = logging.getLogger(__name__)

RENEW_EVERY_S = 0.5
RETRY_S = 0.2
FENCE_AFTER_S = 1.5
DROP_AFTER_S = 30.0


class Fence:
    """Whether this worker may still publish. Pure: told of every answered renewal by the time the call went out."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._renewed_s = clock()

    def renewed(self, called_s: float) -> None:
        self._renewed_s = max(self._renewed_s, called_s)

    @property
    def is_up(self) -> bool:
        return self._clock() - self._renewed_s > FENCE_AFTER_S

    @property
    def is_hopeless(self) -> bool:
        return self._clock() - self._renewed_s > DROP_AFTER_S


class Renewals:
    """Output thread. `turn()` comes before publishing: a process that was paused asks first."""

    def __init__(self, ctx: FrontContext, ends: RequestEnds, publisher: Publisher) -> None:
        self._ctx = ctx
        self._ends = ends
        self._publisher = publisher
        self._due_s = ctx.clock()
        self.fence = Fence(ctx.clock)
        self.is_answered = True  # the last renewal was; while not, nothing else is tried: each try may take a second

    def next_s(self) -> float:
        return self._due_s

    def turn(self) -> None:
        ctx = self._ctx
        now = ctx.clock()
        if now < self._due_s:
            return
        self.is_answered = self._renew()
        if self.is_answered:
            self._due_s = now + RENEW_EVERY_S
            return
        self._due_s = ctx.clock() + RETRY_S
        if self.fence.is_hopeless:
            self._drop_all()

    def _renew(self) -> bool:
        ctx, called_s = self._ctx, self._ctx.clock()
        held = [request for request in ctx.live.values() if request.phase is not Phase.TAKEN]
        try:
            lost = ctx.store.renew([request.renew_item() for request in held]) if held else []
        except StateUnavailable:
            return False
        self.fence.renewed(called_s)
        ctx.link.send(Lease())
        for item, verdict in lost:
            request = ctx.live.get(item.rid)
            if request is not None and request.token == item.token:
                self._publisher.verdict(request, verdict)
        return True

    def _drop_all(self) -> None:
        log.error("no answer of the state server for %.0f s: dropping %d requests", DROP_AFTER_S, len(self._ctx.live))
        for request in list(self._ctx.live.values()):
            self._ends.lost(request, Gone())
