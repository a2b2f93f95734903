"""The output thread: waits for the engine, the hub and the clock, and lets each part have its turn.

turn:  posts of the hub -> messages of the engine -> repeated calls, timers -> renew -> publish -> beat -> claim
Renewing comes before publishing: a process that was paused asks first whether it still owns anything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from configs.schema import Settings
from engines import messages
from engines.messages import EngineMessage
from engines.models.source import resolve_model
from engines.process import EngineChild
from engines.tokenizer import Tokenizer
from kvstore.clock import Clock, now_s
from kvstore.state.store import StateStore
from tasks.front.arrivals import Arrivals
from tasks.front.claims import Claims
from tasks.front.context import FrontContext, RecentEnds
from tasks.front.drain import Drain, DrainState
from tasks.front.ends import RequestEnds
from tasks.front.engine_life import EngineLife
from tasks.front.link import EngineLink
from tasks.front.peers import PeerTable
from tasks.front.ports import HubPort, JobPort
from tasks.front.publisher import Publisher
from tasks.front.registry import Registry
from tasks.front.renewals import Renewals
from tasks.front.timers import RepeatedCalls, Timers
from tasks.names import Identity
from tasks.options import WorkerOptions

log = logging.getLogger(__name__)

MAX_WAIT_S = 0.5
STOP_S = 5.0


class Front:
    """Started and stopped by the hub thread. Its public methods may be called from any thread and only post."""

    def __init__(
        self,
        settings: Settings,
        options: WorkerOptions,
        *,
        identity: Identity,
        hub: HubPort,
        num_slots: int,
        clock: Clock = now_s,
    ) -> None:
        self.store = StateStore(settings.state.state_url, num_shards=settings.state.num_shards)
        self._settings = settings
        self._options = options
        self._identity = identity
        self._hub = hub
        self._clock = clock
        self._num_slots = num_slots
        self._posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._parts: _Parts | None = None
        self._must_stop = False
        self._info: dict[str, Any] = {}
        self.takes_messages = False  # written by the output thread, read by the hub at each of its turns
        self.is_drained = False
        self.is_stopped = False

    # ---------------------------------------------------------------- any thread
    def start(self) -> None:
        self._thread.start()

    def submit(self, job: JobPort) -> None:
        """A Celery task of ours has come."""
        self._post("submit", job)

    def cancel(self, job: JobPort, reason: str) -> None:
        """Celery ended this task (revoke, time limit): end its request everywhere."""
        self._post("cancel", job, reason)

    def set_slots(self, num_slots: int) -> None:
        self._post("set_slots", num_slots)

    def drain(self, deadline_s: float) -> None:
        """Take nothing new. `is_drained` tells when the rest is finished or handed back."""
        self._post("drain", deadline_s)

    def engine_started(self, child: EngineChild) -> None:
        self._post("engine_started", child)

    def engine_not_started(self) -> None:
        self._post("engine_not_started")

    def stop(self) -> None:
        """Ordered end: out of the registry, Shutdown to the engine, thread joined. Nothing is released: drain first."""
        self._must_stop = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join(STOP_S)
        self.is_stopped = True

    def info(self) -> dict[str, Any]:
        """JSON figures for `inspect stats`."""
        return dict(self._info)

    def _post(self, method: str, *args: Any) -> None:
        self._posted.append((method, args))  # type: ignore[arg-type]
        os.eventfd_write(self._wake_fd, 1)

    # ---------------------------------------------------------------- output thread
    def _run(self) -> None:
        try:
            parts = self._parts = _Parts(self)
            parts.life.start()
            while not self._must_stop:
                self._wait(parts)
                self._turn(parts)
            self._leave(parts)
        except Exception:
            log.exception("the output thread failed")
            self.takes_messages = False
            self._hub.front_failed()
        finally:
            self.is_drained = True

    def _wait(self, parts: _Parts) -> None:
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        if parts.ctx.link.is_attached:
            events = select.POLLIN | (select.POLLOUT if parts.ctx.link.wants_write else 0)
            poller.register(parts.ctx.link, events)
        wait_s = min(max(parts.next_s() - self._clock(), 0.0), MAX_WAIT_S)
        poller.poll(0 if self._posted else wait_s * 1e3)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)

    def _turn(self, parts: _Parts) -> None:
        ctx = parts.ctx
        while self._posted:
            method, args = self._posted.popleft()
            _guarded(getattr(parts, method), *args)  # type: ignore[call-overload]
        ctx.link.flush()
        parts.read_engine()
        ctx.calls.run()
        ctx.timers.run_due()
        _guarded(parts.life.check_hang)
        _guarded(parts.renewals.turn)
        if parts.renewals.is_answered and not parts.renewals.fence.is_up:
            _guarded(parts.publisher.turn)
            _guarded(parts.claims.start_alone)
            _guarded(parts.claims.fill)
            room = parts.claims.room()
            _guarded(lambda: parts.registry.turn(free_hands=room, num_waiting=len(parts.claims.hands)))
        _guarded(parts.drain_.turn)
        self._info = parts.info()
        self.is_drained = parts.drain_.state is DrainState.DRAINED

    def intake_changed(self) -> None:
        """The engine came or went, or a drain began: the hub fetches messages, or no longer."""
        assert self._parts is not None
        ctx = self._parts.ctx
        self.takes_messages = ctx.ready is not None and not ctx.is_draining
        self._hub.intake_changed()

    def _leave(self, parts: _Parts) -> None:
        self.takes_messages = False
        parts.life.stop()
        parts.registry.leave(parts.ctx.identity.incarnation)
        parts.ctx.link.send(messages.Shutdown())
        parts.ctx.link.flush()
        parts.ctx.link.detach()  # EOF says the same to an engine that cannot read any more
        self.store.close()


class _Parts:
    """All parts, wired. Lives in the output thread."""

    def __init__(self, front: Front) -> None:
        settings, clock = front._settings, front._clock
        model = settings.model
        tokenizer = Tokenizer.from_folder(resolve_model(model.path, revision=model.revision or None))
        timers = Timers(clock)
        ctx = self.ctx = FrontContext(
            settings=settings,
            options=front._options,
            identity=front._identity,
            store=front.store,
            tokenizer=tokenizer,
            hub=front._hub,
            clock=clock,
            num_slots=front._num_slots,
            link=EngineLink(),
            timers=timers,
            calls=RepeatedCalls(clock),
            recent=RecentEnds(clock),
        )
        self._front = front
        self.ends = RequestEnds(ctx)
        self.peers = PeerTable(model=ctx.model)
        self.publisher = Publisher(ctx, self.ends)
        self.renewals = Renewals(ctx, self.ends, self.publisher)
        self.claims = Claims(ctx, self.ends, self.peers)
        self.arrivals = Arrivals(ctx, self.ends)
        self.registry = Registry(ctx, self.peers)
        self.life = EngineLife(
            ctx,
            ends=self.ends,
            claims=self.claims,
            arrivals=self.arrivals,
            registry=self.registry,
            on_intake=front.intake_changed,
        )
        self.drain_ = Drain(ctx, ends=self.ends, claims=self.claims, arrivals=self.arrivals, registry=self.registry)
        self._handlers: dict[type, Callable[[Any], None]] = {
            messages.Ready: self._on_ready,
            messages.Tokens: self.claims.on_tokens,
            messages.Granted: self.claims.on_granted,
            messages.NoGrant: self.claims.on_no_grant,
            messages.Pushed: self.claims.on_pushed,
            messages.Preempted: self.claims.on_preempted,
            messages.Failed: self._on_failed,
            messages.Incoming: self.arrivals.on_incoming,
            messages.Arrived: self.arrivals.on_arrived,
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
        self._front.intake_changed()

    def engine_started(self, child: EngineChild) -> None:
        self.life.started(child)

    def engine_not_started(self) -> None:
        self.life.not_started()

    # ---------------------------------------------------------------- messages of the engine
    def read_engine(self) -> None:
        received, is_over = self.ctx.link.receive()
        if received:
            self.life.heard()
        for message in received:
            _guarded(self._dispatch, message)
        if is_over:
            _guarded(self.life.on_eof)

    def _dispatch(self, message: EngineMessage) -> None:
        self._handlers[type(message)](message)

    def _on_ready(self, message: messages.Ready) -> None:
        self.peers.set_own(compat=message.address.compat, host_id=message.address.host_id)
        self.life.on_ready(message)

    def _on_failed(self, message: messages.Failed) -> None:
        request = self.ctx.live.get(message.rid)
        if request is not None:
            self.ends.failed(request, message.code, message.message)

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


def _guarded(call: Callable[..., None], *args: Any) -> None:
    """One bad message must not end the thread that hundreds of requests depend on."""
    try:
        call(*args)
    except Exception:
        log.exception("the output thread could not handle %s", args[0] if args else call)
