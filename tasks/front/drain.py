"""Draining: take nothing new, finish what is here, hand back the rest at the deadline.

RUNNING --drain--> FINISHING --all done, or deadline: release the rest--> HANDING_BACK --calls answered--> DRAINED
"""

from __future__ import annotations

import logging
from enum import StrEnum
from typing import Final

from tasks.front.arrivals import Arrivals
from tasks.front.claims import Claims
from tasks.front.context import FrontContext
from tasks.front.ends import RequestEnds
from tasks.front.registry import Registry

log = logging.getLogger(__name__)

CALLS_PATIENCE_S = 3.0  # for releases without an answer; leases heal what is left
QUIET_S = 0.2  # a prefill worker may have been granted blocks here just before it heard that we drain


class DrainState(StrEnum):
    RUNNING = "running"
    FINISHING = "finishing"
    HANDING_BACK = "handing_back"
    DRAINED = "drained"


TRANSITIONS: Final[dict[DrainState, frozenset[DrainState]]] = {
    DrainState.RUNNING: frozenset({DrainState.FINISHING}),
    DrainState.FINISHING: frozenset({DrainState.HANDING_BACK}),
    DrainState.HANDING_BACK: frozenset({DrainState.DRAINED}),
    DrainState.DRAINED: frozenset(),
}


class Drain:
    """Output thread."""

    def __init__(
        self, ctx: FrontContext, *, ends: RequestEnds, claims: Claims, arrivals: Arrivals, registry: Registry
    ) -> None:
        self._ctx = ctx
        self._ends = ends
        self._claims = claims
        self._arrivals = arrivals
        self._registry = registry
        self._deadline_s = 0.0
        self._quiet_since_s: float | None = None
        self.state = DrainState.RUNNING

    def start(self, deadline_s: float) -> None:
        """Begin, or shorten the deadline of a drain that runs. `deadline_s`: from now."""
        deadline = self._ctx.clock() + deadline_s
        if self.state is DrainState.RUNNING:
            log.info("draining: %d requests here, at most %.1f s", len(self._ctx.live), deadline_s)
            self._advance(DrainState.FINISHING)
            self._deadline_s = deadline
            self._ctx.is_draining = True
            self._claims.requeue_hands()
            self._registry.beat_soon()
        self._deadline_s = min(self._deadline_s, deadline)

    def next_s(self) -> float | None:
        return None if self.state in (DrainState.RUNNING, DrainState.DRAINED) else self._ctx.clock() + 0.05

    def turn(self) -> None:
        now = self._ctx.clock()
        if self.state is DrainState.FINISHING:
            self._finish(now)
        if self.state is DrainState.HANDING_BACK and (not len(self._ctx.calls) or now > self._deadline_s):
            self._advance(DrainState.DRAINED)

    def _finish(self, now: float) -> None:
        ctx = self._ctx
        is_busy = bool(ctx.live or self._claims.num_claiming or self._arrivals.num_pending)
        if is_busy:
            self._quiet_since_s = None
            if now < self._deadline_s:
                return
            for request in list(ctx.live.values()):
                self._ends.released(request, "the worker drains")
        elif now < self._deadline_s:
            if self._quiet_since_s is None:
                self._quiet_since_s = now
            if now - self._quiet_since_s < QUIET_S:
                return
        self._deadline_s = now + CALLS_PATIENCE_S
        self._advance(DrainState.HANDING_BACK)

    def _advance(self, state: DrainState) -> None:
        assert state in TRANSITIONS[self.state], f"{self.state} -> {state}"
        self.state = state
