"""The output thread: waits for the engine, the hub and the clock, and lets each part have its turn.

turn:  posts of the hub -> messages of the engine -> timers, repeated calls -> renew -> publish -> beat -> claim
Renewing comes before publishing: a process that was paused asks first whether it still owns anything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from collections import deque
from typing import Any

from configs.schema import Settings
from engines import messages
from engines.process import EngineChild
from kvstore.clock import Clock, now_s
from kvstore.state.store import StateStore
from tasks.front.drain import DrainState
from tasks.front.parts import FrontParts, guarded
from tasks.front.ports import HubPort, JobPort
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
        self._posted: deque[tuple[str, tuple[Any, ...]]] = deque()  # a method of FrontParts, its arguments
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._parts: FrontParts | None = None
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
        self._posted.append((method, args))
        os.eventfd_write(self._wake_fd, 1)

    # ---------------------------------------------------------------- output thread
    def _run(self) -> None:
        try:
            parts = self._parts = FrontParts(
                self._settings,
                self._options,
                identity=self._identity,
                store=self.store,
                hub=self._hub,
                num_slots=self._num_slots,
                clock=self._clock,
                on_intake=self._intake_changed,
            )
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

    def _wait(self, parts: FrontParts) -> None:
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        if parts.ctx.link.is_attached:
            events = select.POLLIN | (select.POLLOUT if parts.ctx.link.wants_write else 0)
            poller.register(parts.ctx.link, events)
        wait_s = min(max(parts.next_s() - self._clock(), 0.0), MAX_WAIT_S)
        poller.poll(0 if self._posted else wait_s * 1e3)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)

    def _turn(self, parts: FrontParts) -> None:
        ctx = parts.ctx
        while self._posted:
            method, args = self._posted.popleft()
            guarded(getattr(parts, method), *args)
        ctx.link.flush()
        parts.read_engine()
        ctx.timers.run_due()
        ctx.calls.run()
        guarded(parts.life.check_hang)
        guarded(parts.renewals.turn)
        if parts.renewals.is_answered and not parts.renewals.fence.is_up:
            guarded(parts.publisher.turn)
            guarded(parts.claims.start_alone)
            guarded(parts.claims.fill)
            room = parts.claims.room()
            guarded(lambda: parts.registry.turn(free_hands=room, num_waiting=len(parts.claims.hands)))
        guarded(parts.drain_.turn)
        self._info = parts.info()
        self.is_drained = parts.drain_.state is DrainState.DRAINED

    def _intake_changed(self) -> None:
        """The engine came or went, or a drain began: the hub fetches messages, or no longer."""
        assert self._parts is not None
        ctx = self._parts.ctx
        self.takes_messages = ctx.ready is not None and not ctx.is_draining
        self._hub.intake_changed()

    def _leave(self, parts: FrontParts) -> None:
        self.takes_messages = False
        parts.life.stop()
        parts.registry.leave(parts.ctx.identity.incarnation)
        parts.ctx.link.send(messages.Shutdown())
        parts.ctx.link.flush()
        parts.ctx.link.detach()  # EOF says the same to an engine that cannot read any more
        self.store.close()
