"""The worker pool whose tasks live in an engine.

Celery calls `apply_async` of a pool with callbacks that are methods of its `Request`; the pool keeps that request in a
`Job` and ends it when the engine has done its part. So hundreds of sequences are live in one worker, and events,
`inspect active`, revoke, time limits and warm shutdown are all true.

    hub thread (Celery)                      output thread (tasks.front)            engine process
    on_apply -> Job -> front.submit  ----->  claim, Add ------------------------->  steps
    Job._accept, _succeed, ...  <-- post --  handed over, ended  <----------------  Tokens, Pushed

Iron rule: Celery and kombu are called in the hub thread only (channels and event dispatcher are not thread-safe). Other
threads `post`: a deque and an eventfd that the hub watches.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from celery.concurrency.base import BasePool, apply_target
from celery.exceptions import TimeLimitExceeded
from celery.worker import state

from engines.process import EngineChild, spawn_engine
from kvstore.clock import now_s
from kvstore.readable import wait_readable
from kvstore.state.replies import Turn
from tasks.acks import BatchedAcks, renew_unacked
from tasks.job import Job
from tasks.names import Identity
from tasks.options import WorkerOptions, with_ranks
from tasks.wakeups import WakeupSender

if TYPE_CHECKING:
    from tasks.front import Front

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005  # measured: with 5 ms the hub waits behind the output thread (p99 600 ms, with this 17 ms)
LIMITS_EVERY_S = 0.25
ENGINE_EXIT_S = 5.0
LAST_CALLS_S = 5.0  # after the drain's deadline: releases and acks still under way


class EnginePool(BasePool):  # type: ignore[misc]
    """See the module. Owned by the hub thread; `post` and what says so may be called from any thread."""

    signal_safe = False
    body_can_be_buffer = True
    task_join_will_block = False

    worker: Any = None
    worker_options: WorkerOptions

    # ---------------------------------------------------------------- start
    def attach_worker(self, worker: Any, options: WorkerOptions, secret: bytes) -> None:
        """Called once, before the start. `secret`: of the cluster, for the engine's peers."""
        self.worker = worker
        self.worker_options = options
        self._secret = secret

    def on_start(self) -> None:
        from tasks.front import Front

        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._settings = self.app.celeriac_settings
        self._jobs: dict[str, Job] = {}
        self._posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._acks = BatchedAcks()
        self._side = ThreadPoolExecutor(2, thread_name_prefix="side")  # ordinary small tasks on the same worker
        self._sender = WakeupSender(self._settings, app=self.app)
        self._child: EngineChild | None = None
        self._renewed_s = now_s()
        self._renew_every_s = self._settings.state.visibility_timeout_s / 4
        self.front: Front = Front(
            self._settings,
            self.worker_options,
            identity=Identity(self.worker_options.node),
            hub=self,
            num_slots=self.limit,
        )
        self.front.start()

    def register_with_event_loop(self, hub: Any) -> None:
        """Again after every reconnect."""
        hub.add_reader(self._wake_fd, self._run_posted)
        hub.call_repeatedly(LIMITS_EVERY_S, self._check_time_limits)
        hub.call_repeatedly(self._renew_every_s, self._renew)

    # ---------------------------------------------------------------- any thread
    def post(self, call: Callable[..., None], *args: Any) -> None:
        """Run `call(*args)` in the hub thread, soon."""
        self._posted.append((call, args))
        os.eventfd_write(self._wake_fd, 1)

    def start_engine(self, incarnation: str) -> None:
        self.post(self._start_engine, incarnation)

    def send_turns(self, turns: list[Turn]) -> None:
        if turns:
            self.post(self._sender.send, turns, self.front.store)

    def send_decode(self, rid: str, wake_n: int, attempt: int, queue: str, remaining_s: float) -> None:
        self.post(lambda: self._sender.send_decode(rid, wake_n, attempt, queue, remaining_s=remaining_s))

    def intake_changed(self) -> None:
        """The hub looks at `takes_messages` at each of its turns: make it turn."""
        self.post(_nothing)

    def front_failed(self) -> None:
        """The output thread cannot go on: leave, so that whoever supervises starts the worker anew."""
        self.post(_exit_worker)

    @property
    def takes_messages(self) -> bool:
        return self.front.takes_messages

    # ---------------------------------------------------------------- tasks
    def on_apply(
        self,
        target: Callable[..., Any],
        args: Any = (),
        kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        timeout: float | None = None,
        **_: Any,
    ) -> Any:
        request: Any = getattr(callback, "__self__", None)  # `callback` is Request.on_success
        if not getattr(getattr(request, "task", None), "is_engine_task", False):
            return self._side.submit(apply_target, target, args, kwargs, callback, accept_callback)
        request._on_ack = lambda *_: self._acks.add(request.message)
        if request.id in state.successful_requests:  # delivered again after we had finished it: only ack
            state.task_ready(request)
            self._acks.add(request.message)
            return None
        job = self._jobs.get(request.id)
        if job is not None:
            job.adopt(request)
            return job
        job = self._jobs[request.id] = Job(self, request, timeout)
        self.front.submit(job)
        return job

    def forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)

    def cancel_request(self, job: Job, reason: str) -> None:
        self.front.cancel(job, reason)

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """Nothing: Celery calls `Job.terminate` as well, which knows the request."""

    def grow(self, n: int = 1) -> None:
        self._set_slots(self.limit + n)

    def shrink(self, n: int = 1) -> None:
        self._set_slots(max(1, self.limit - n))

    def _set_slots(self, num_slots: int) -> None:
        self.limit = num_slots
        self.front.set_slots(num_slots)

    # ---------------------------------------------------------------- hub's turns
    def _run_posted(self, *_: Any) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        while self._posted:
            call, args = self._posted.popleft()
            try:
                call(*args)
            except Exception:
                log.exception("a call posted to the hub failed")
        self._acks.flush()

    def _check_time_limits(self) -> None:
        now = now_s()
        for job in list(self._jobs.values()):
            if job.time_limit_s and now - job.submitted_s > job.time_limit_s:
                job.expire(TimeLimitExceeded(job.time_limit_s))
        self._acks.flush()  # also those of revokes, which come without a post

    def _renew(self) -> None:
        self._renewed_s = now_s()
        consumer = self.worker.consumer.task_consumer
        if consumer is not None:
            renew_unacked(consumer.channel, [job.request.message for job in self._jobs.values()])

    def _start_engine(self, incarnation: str) -> None:
        """In the main thread: the child's death signal is tied to the thread that made it."""
        self._end_child(wait_s=0.0)
        options = self.worker_options
        try:
            self._child = spawn_engine(
                with_ranks(self._settings, options),
                role=options.role,
                node=options.node,
                incarnation=incarnation,
                secret=self._secret,
                cpus=options.cpus,
                gpu=options.gpu,
            )
        except OSError as error:
            log.error("the engine process could not be started, trying again: %s", error)
            self.front.engine_not_started()
            return
        self.front.engine_started(self._child)

    def _end_child(self, *, wait_s: float) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        try:
            child.wait(wait_s)
        except Exception:  # subprocess.TimeoutExpired, or that of another kind of child
            child.kill()
            child.wait(ENGINE_EXIT_S)

    # ---------------------------------------------------------------- end
    def drain(self, deadline_s: float | None = None) -> int:
        """Take nothing new; when the rest is done (or at the deadline) the worker stops itself. Returns live tasks."""
        self.front.drain(self._settings.worker.drain_timeout_s if deadline_s is None else deadline_s)
        self._stop_when_drained()
        return len(self._jobs)

    def _stop_when_drained(self) -> None:
        if self.front.is_drained:
            state.should_stop = 0
        else:
            self.worker.hub.call_later(0.1, self._stop_when_drained)

    def on_stop(self) -> None:
        """Warm shutdown. The queue is cancelled, the channel still open: acks and events work until the end."""
        self._wind_down(self._settings.worker.drain_timeout_s)

    def on_terminate(self) -> None:
        """Cold shutdown: everything is handed back at once."""
        self._wind_down(0.0)

    def _wind_down(self, drain_s: float) -> None:
        if not hasattr(self, "front") or self.front.is_stopped:
            return
        self.front.drain(drain_s)  # an earlier deadline, set by the drain command, stays
        end_s = now_s() + drain_s + LAST_CALLS_S
        while not self.front.is_drained and now_s() < end_s:
            wait_readable([self._wake_fd], 0.1)
            self._run_posted()
            self._check_time_limits()
            if now_s() - self._renewed_s > self._renew_every_s:
                self._renew()
        self.front.stop()  # the last beat, Shutdown to the engine
        self._run_posted()
        for job in list(self._jobs.values()):
            job.requeue()
        self._run_posted()
        self._end_child(wait_s=ENGINE_EXIT_S)
        self._side.shutdown(wait=False)

    # ---------------------------------------------------------------- figures
    def engine_info(self) -> dict[str, Any]:
        """For `inspect stats` and Flower: JSON only."""
        return self.front.info()

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = dict(super()._get_info())
        if hasattr(self, "front"):
            info.update(self.engine_info(), tasks=len(self._jobs))
        return info


def _nothing() -> None:
    """Posted only to wake the hub."""


def _exit_worker() -> None:
    state.should_terminate = 1
