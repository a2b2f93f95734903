"""The parts of the output thread, wired: who gets which message of the engine, which post of the hub."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import configs
from configs.schema import Settings
from engines import messages
from engines.messages import EngineMessage
from engines.models.source import resolve_model
from engines.process import EngineChild
from engines.tokenizer import Tokenizer
from kvstore.clock import Clock
from kvstore.state.store import StateStore
from tasks.front.arrivals import Arrivals
from tasks.front.calls import RepeatedCalls
from tasks.front.claims import Claims
from tasks.front.context import FrontContext, RecentEnds
from tasks.front.drain import Drain
from tasks.front.ends import RequestEnds
from tasks.front.engine_life import EngineLife
from tasks.front.link import EngineLink
from tasks.front.peers import PeerTable
from tasks.front.ports import HubPort, JobPort
from tasks.front.prefixes import Prefixes
from tasks.front.publisher import Publisher
from tasks.front.registry import Registry
from tasks.front.renewals import Renewals
from tasks.front.reports import EngineReports
from tasks.front.spans import PhaseSpans
from tasks.front.timers import Timers
from tasks.names import Identity
from tasks.options import WorkerOptions

log = logging.getLogger(__name__)


class FrontParts:
    """All parts, wired. Output thread."""

    def __init__(
        self,
        settings: Settings,
        options: WorkerOptions,
        *,
        identity: Identity,
        store: StateStore,
        hub: HubPort,
        num_slots: int,
        clock: Clock,
        on_intake: Callable[[], None],
    ) -> None:
        model = settings.model
        tokenizer = Tokenizer.from_folder(resolve_model(model.path, revision=model.revision or None))
        timers = Timers(clock)
        ctx = self.ctx = FrontContext(
            settings=settings,
            options=options,
            identity=identity,
            store=store,
            tokenizer=tokenizer,
            hub=hub,
            clock=clock,
            num_slots=num_slots,
            link=EngineLink(),
            timers=timers,
            calls=RepeatedCalls(clock),
            recent=RecentEnds(clock),
        )
        self._on_intake = on_intake
        self.ends = RequestEnds(ctx)
        self.peers = PeerTable(model=ctx.model)
        self.publisher = Publisher(ctx, self.ends)
        self.renewals = Renewals(ctx, self.ends, self.publisher)
        self.prefixes = Prefixes(ctx, lambda: configs.secrets(settings))
        self.claims = Claims(ctx, self.ends, self.peers, self.prefixes)
        self.spans = PhaseSpans(ctx)
        self.reports = EngineReports(ctx, self.ends, self.peers, self.spans)
        self.arrivals = Arrivals(ctx, self.ends)
        self.registry = Registry(ctx, self.peers, self.prefixes, self.spans)
        self.life = EngineLife(
            ctx,
            ends=self.ends,
            claims=self.claims,
            arrivals=self.arrivals,
            registry=self.registry,
            on_intake=on_intake,
        )
        self.drain_ = Drain(ctx, ends=self.ends, claims=self.claims, arrivals=self.arrivals, registry=self.registry)
        self._handlers: dict[type, Callable[[Any], None]] = {
            messages.Ready: self._on_ready,
            messages.Tokens: self.reports.on_tokens,
            messages.Granted: self.reports.on_granted,
            messages.NoGrant: self.reports.on_no_grant,
            messages.Pushed: self.reports.on_pushed,
            messages.Preempted: self.reports.on_preempted,
            messages.Kept: self.prefixes.on_kept,
            messages.Failed: self.reports.on_failed,
            messages.Incoming: self.arrivals.on_incoming,
            messages.Arrived: self.arrivals.on_arrived,
            messages.Stepped: self.spans.on_stepped,
            messages.ArrivalLost: self.arrivals.on_lost,
            messages.Stats: self._on_stats,
        }

    def next_s(self) -> float:
        """When something is due without any message."""
        times: tuple[float | None, ...] = (
            self.ctx.timers.next_s(),
            self.ctx.calls.next_s(),
            self.renewals.next_s(),
            self.drain_.next_s(),
        )
        if self.renewals.is_answered and not self.renewals.fence.is_up:
            times += (self.registry.next_s(), self.publisher.next_s())
        return min(time for time in times if time is not None)

    # ---------------------------------------------------------------- posts of the hub
    def submit(self, job: JobPort) -> None:
        ctx = self.ctx
        if job.stage == "decode":
            self.arrivals.submit(job)
        elif ctx.ready is None or ctx.is_draining:
            job.requeue()
        else:
            self.claims.submit(job)

    def cancel(self, job: JobPort, reason: str) -> None:
        for other in self.claims.cancel(job.rid) + self.arrivals.cancel(job.rid):
            if other is not job:
                other.revoke(reason)
        self.ends.cancelled(job.rid, reason)

    def set_slots(self, num_slots: int) -> None:
        self.ctx.num_slots = num_slots

    def drain(self, deadline_s: float) -> None:
        self.drain_.start(deadline_s)
        self._on_intake()

    def engine_started(self, child: EngineChild) -> None:
        self.life.started(child)

    def engine_not_started(self) -> None:
        self.life.not_started()

    # ---------------------------------------------------------------- messages of the engine
    def read_engine(self) -> None:
        """Handle what it says. The calls that this gives rise to are made when all of it is read."""
        received, is_over = self.ctx.link.receive()
        if received:
            self.life.heard()
        for message in received:
            guarded(self._dispatch, message)
        if is_over:
            guarded(self.life.on_eof)
        self.ctx.calls.run()

    def _dispatch(self, message: EngineMessage) -> None:
        self._handlers[type(message)](message)

    def _on_ready(self, message: messages.Ready) -> None:
        self.peers.set_own(message.address)
        self.life.on_ready(message)

    def _on_stats(self, message: messages.Stats) -> None:
        self.ctx.stats = message

    # ---------------------------------------------------------------- figures
    def info(self) -> dict[str, Any]:
        ctx, ready, stats = self.ctx, self.ctx.ready, self.ctx.stats
        return {
            "model": ctx.model,
            "role": ctx.options.role,
            "incarnation": ctx.identity.incarnation,
            "engine": str(self.life.state),
            "engine_pid": 0 if ready is None else ready.pid,
            "engine_deaths": self.life.num_deaths,
            "gpu": ctx.options.gpu,
            "cpus": list(ctx.options.cpus),
            "device": "" if ready is None else ready.device,
            "visible_device": "" if ready is None else ready.visible_device,
            "live": len(ctx.live),
            "waiting": len(self.claims.hands) + self.claims.num_claiming,
            "arriving": self.arrivals.num_pending,
            "unanswered_calls": len(ctx.calls),
            "draining": ctx.is_draining,
            "slots": ctx.num_slots,
            "blocks": {} if stats is None else dict(stats.blocks),
            "step_ms": 0.0 if stats is None else round(stats.step_ms, 3),
        }


def guarded(call: Callable[..., None], *args: Any) -> None:
    """One bad message must not end the thread that hundreds of requests depend on."""
    try:
        call(*args)
    except Exception:
        log.exception("the output thread could not handle %s", args[0] if args else call)
