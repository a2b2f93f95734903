"""The engine's life as the front sees it: start, Ready, death, the next one.

STARTING --Ready--> UP --EOF, hang--> DOWN --back-off--> STARTING
In DOWN, in this order: 1. a new incarnation, which every later token carries; 2. every request is dropped; 3. the
state server evicts the old incarnation, repeated until it answers; 4. a new engine. Until it is up nothing is
claimed and no message is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import StrEnum
from typing import Final

from engines.messages import Ready
from engines.process import EngineChild
from tasks.front.arrivals import Arrivals
from tasks.front.claims import Claims
from tasks.front.context import FrontContext
from tasks.front.ends import RequestEnds
from tasks.front.registry import Registry

log = logging.getLogger(__name__)

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 10.0
HEALTHY_AFTER_S = 30.0
HANG_AFTER_S = 60.0  # Stats come each 0.5 s; a step of a long prompt on few cores may take seconds


class EngineState(StrEnum):
    STARTING = "starting"
    UP = "up"
    DOWN = "down"
    STOPPED = "stopped"


TRANSITIONS: Final[dict[EngineState, frozenset[EngineState]]] = {
    EngineState.STARTING: frozenset({EngineState.UP, EngineState.DOWN, EngineState.STOPPED}),
    EngineState.UP: frozenset({EngineState.DOWN, EngineState.STOPPED}),
    EngineState.DOWN: frozenset({EngineState.STARTING, EngineState.STOPPED}),
    EngineState.STOPPED: frozenset(),
}


def next_backoff_s(backoff_s: float, up_s: float) -> float:
    """How long to wait before the next start. An engine that had been up for a while starts at once again."""
    return BACKOFF_FIRST_S if up_s >= HEALTHY_AFTER_S else min(max(2 * backoff_s, BACKOFF_FIRST_S), BACKOFF_MAX_S)


class EngineLife:
    """Output thread."""

    def __init__(
        self,
        ctx: FrontContext,
        *,
        ends: RequestEnds,
        claims: Claims,
        arrivals: Arrivals,
        registry: Registry,
        on_intake: Callable[[], None],
    ) -> None:
        self._ctx = ctx
        self._ends = ends
        self._claims = claims
        self._arrivals = arrivals
        self._registry = registry
        self._on_intake = on_intake
        self.state = EngineState.DOWN
        self._backoff_s = 0.0
        self._heard_s = ctx.clock()
        self._up_since_s = 0.0
        self.num_deaths = 0

    def start(self) -> None:
        """Ask the hub thread for an engine of the current incarnation."""
        if self.state is EngineState.STOPPED:
            return
        self._advance(EngineState.STARTING)
        self._heard_s = self._ctx.clock()
        self._ctx.hub.start_engine(self._ctx.identity.incarnation)

    def started(self, child: EngineChild) -> None:
        self._ctx.link.attach(child.sock)

    def not_started(self) -> None:
        self._died("it could not be started")

    def heard(self) -> None:
        self._heard_s = self._ctx.clock()

    def on_ready(self, message: Ready) -> None:
        ctx = self._ctx
        self._advance(EngineState.UP)
        self._up_since_s = ctx.clock()
        ctx.ready = message
        log.info(
            "engine %d is up: %d blocks of %d tokens, %s on %s, %d threads, loaded in %.1f s",
            message.pid, message.num_blocks, message.block_size, message.dtype, message.device, message.num_threads,
            message.load_s,
        )  # fmt: skip
        self._registry.beat_soon()
        self._on_intake()

    def on_eof(self) -> None:
        self._died("its socket was closed")

    def check_hang(self) -> None:
        """An engine that says nothing for long is as good as dead; `start_engine` kills what is left of it."""
        silence_s = self._ctx.clock() - self._heard_s
        patience_s = self._ctx.settings.worker.engine_start_timeout_s
        if self.state is EngineState.UP:
            patience_s = HANG_AFTER_S
        if self.state in (EngineState.STARTING, EngineState.UP) and silence_s > patience_s:
            self._died(f"it said nothing for {silence_s:.0f} s")

    def stop(self) -> None:
        self._advance(EngineState.STOPPED)

    def _died(self, why: str) -> None:
        ctx = self._ctx
        if self.state is EngineState.STOPPED:
            ctx.link.detach()
            return
        was_up = self.state is EngineState.UP
        self._advance(EngineState.DOWN)
        self.num_deaths += 1
        former = ctx.identity.renew()
        log.error("the engine process died (%s): %d requests lose it; %s ends", why, len(ctx.live), former)
        ctx.link.detach()
        ctx.ready = ctx.stats = None
        self._on_intake()
        for request in list(ctx.live.values()):
            self._ends.engine_died(request)
        self._arrivals.engine_died()
        self._claims.requeue_hands()
        ctx.calls.do(
            f"evict {former}",
            lambda: ctx.store.evict(former, "engine"),
            lambda evicted: ctx.hub.send_turns(evicted.turns),
        )
        ctx.calls.do(f"retire {former}", lambda: ctx.store.retire(former), lambda _: None)
        up_s = ctx.clock() - self._up_since_s if was_up else 0.0
        self._backoff_s = next_backoff_s(self._backoff_s, up_s)
        ctx.timers.after(self._backoff_s, self.start)

    def _advance(self, state: EngineState) -> None:
        assert state in TRANSITIONS[self.state], f"{self.state} -> {state}"
        self.state = state
