"""One Celery task while its work is in the engine: the bridge from the output thread back to Celery's request."""

from __future__ import annotations

import logging
import os
import signal
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionInfo
from celery.exceptions import Retry
from celery.worker import state

from kvstore.clock import now_s
from tasks.errors import RequestEnded

if TYPE_CHECKING:
    from tasks.pool import EnginePool

log = logging.getLogger(__name__)


class Job:
    """Owned by the hub thread. The public methods may be called from any thread: they only post.

    `Request` keeps a weak reference to it as the result of the pool's apply and calls `terminate` on a revoke.
    """

    def __init__(self, pool: EnginePool, request: Any, time_limit_s: float | None) -> None:
        self.pool = pool
        self.request = request  # celery.worker.request.Request; another one after an adoption
        self.id: str = request.id
        self.rid: str = request.args[0]
        self.stage: str = request.name.rsplit(".", 1)[1]
        self.time_limit_s = time_limit_s
        self.submitted_s = now_s()
        self.started_s: float | None = None
        self.is_over = False

    # ---------------------------------------------------------------- any thread
    def accept(self, started_s: float) -> None:
        """Its work began at `started_s`: task-started, and it is listed as active."""
        self.pool.post(self._accept, started_s)

    def succeed(self, outcome: str) -> None:
        """Its part of the request is done."""
        self.pool.post(self._succeed, outcome, now_s())

    def retry(self, reason: str) -> None:
        """The request went back to the queue and comes again under another task id: RETRY in Flower."""
        self.pool.post(self._fail, Retry(message=reason))

    def fail(self, error: RequestEnded) -> None:
        self.pool.post(self._fail, error)

    def revoke(self, reason: str) -> None:
        """The request was cancelled."""
        self.pool.post(self._revoke, reason)

    def requeue(self) -> None:
        """Not begun here and not to be: back to the head of its queue, under the same id."""
        self.pool.post(self._requeue)

    # ---------------------------------------------------------------- hub thread
    def adopt(self, request: Any) -> None:
        """The broker delivered our own message again: go on with the new one, which has a channel that lives."""
        state.task_ready(self.request)
        state.task_reserved(request)
        self.request = request
        if self.started_s is not None:
            request.on_accepted(os.getpid(), self.started_s)

    def terminate(self, signum: int | None = None) -> None:  # noqa: ARG002 - Celery's signature
        """revoke(terminate=True): stop the request in the engine and in the state."""
        if not self._close():
            return
        self.pool.cancel_request(self, "revoked")
        if self.started_s is None:
            self.request.revoked()  # announces task-revoked and acks; a started one was announced by Celery

    def expire(self, error: Exception) -> None:
        """Celery's time limit is over: the backstop behind the request's own deadline."""
        if not self.is_over:
            self.pool.cancel_request(self, "time_limit")
            self._fail(error)

    def _close(self) -> bool:
        """True the first time: the task ends exactly once."""
        if self.is_over:
            return False
        self.is_over = True
        self.pool.forget(self)
        return True

    def _accept(self, started_s: float) -> None:
        if self.is_over or self.started_s is not None:
            return
        if self.request.revoked():  # it was revoked while it waited; this acked it
            if self._close():
                self.pool.cancel_request(self, "revoked")
            return
        self.started_s = started_s
        self.request.on_accepted(os.getpid(), started_s)

    def _succeed(self, outcome: str, ended_s: float) -> None:
        if self._close():
            runtime_s = 0.0 if self.started_s is None else max(ended_s - self.started_s, 0.0)
            self.request.on_success((0, outcome, runtime_s))

    def _fail(self, error: Exception) -> None:
        if not self._close():
            return
        try:
            raise error
        except Exception:
            # `return_ok`: told in one line here, not as the traceback of a task handler.
            self.request.on_failure(ExceptionInfo(), return_ok=True)
        if not isinstance(error, Retry):
            log.warning("%s ended: %s", self.id, error)

    def _revoke(self, reason: str) -> None:
        if self._close():
            self.request._announce_revoked(reason, True, signal.SIGTERM, False)

    def _requeue(self) -> None:
        if self._close():
            state.task_ready(self.request)
            self.request.reject(requeue=True)
