"""How a request leaves this worker. The one place where it is taken out of `live`, dropped in the engine, and its
Celery tasks are ended."""

from __future__ import annotations

import logging

from engines.messages import Drop
from kvstore.errors import KVStoreError
from kvstore.state.replies import Final, Gone, Released, Stale
from kvstore.state.transitions import RequestState
from tasks.errors import RequestExpired, RequestFailed
from tasks.front.context import FrontContext
from tasks.front.ports import JobPort
from tasks.front.requests import LiveRequest, Phase

log = logging.getLogger(__name__)

NO_PAGES_WAIT_S = 0.2  # its turn would come again at once, and loop while all pools are full


class RequestEnds:
    """Output thread."""

    def __init__(self, ctx: FrontContext) -> None:
        self._ctx = ctx

    def finished(self, request: LiveRequest, outcome: str = "finished") -> None:
        """Its part here is done: every choice ended, or the receiver has it."""
        self._leave(request, outcome)
        if outcome != "handed":  # of a handed one the engine has nothing left
            self._ctx.link.send(Drop(request.rid))
        for job in request.jobs:
            job.succeed(outcome)

    def lost(self, request: LiveRequest, verdict: Stale | Final | Gone) -> None:
        """The record is another's, or ended, or gone: stop at once, free its blocks."""
        self._leave(request, _word(verdict))
        self._ctx.link.send(Drop(request.rid))
        for job in request.jobs:
            end_job(job, verdict)

    def released(self, request: LiveRequest, reason: str, *, wait_s: float = 0.0) -> None:
        """Back to the queue, its tokens kept; the wake-up is sent `wait_s` after the state server's answer."""
        self._leave(request, "released")
        self._ctx.link.send(Drop(request.rid))
        self.give_back(request.rid, request.epoch, request.token, wait_s=wait_s)
        for job in request.jobs:
            job.retry(reason)

    def give_back(self, rid: str, epoch: int, token: str, *, wait_s: float = 0.0) -> None:
        """`release`, repeated until it is answered, then the wake-ups."""
        ctx = self._ctx

        def answered(reply: Released | Stale | Final | Gone) -> None:
            if not isinstance(reply, Released):
                return
            if wait_s:
                ctx.timers.after(wait_s, lambda: ctx.hub.send_turns(reply.turns))
            else:
                ctx.hub.send_turns(reply.turns)

        ctx.calls.do(f"release {rid}", lambda: ctx.store.release(rid, epoch, token), answered)

    def failed(self, request: LiveRequest, code: str, message: str) -> None:
        """The engine cannot serve it, ever."""
        ctx, rid, epoch, token = self._ctx, request.rid, request.epoch, request.token
        self._leave(request, f"failed: {code}")
        ctx.link.send(Drop(rid))
        ctx.calls.do(f"finish {rid}", lambda: ctx.store.finish(rid, epoch, token, code), lambda _: None)
        for job in request.jobs:
            job.fail(RequestFailed(rid, code, message))

    def cancelled(self, rid: str, reason: str) -> None:
        """revoke or a time limit: end it in the state, wherever it is, and here at once."""
        ctx = self._ctx
        request = ctx.live.get(rid)
        if request is not None:
            self._leave(request, "cancelled")
            for job in request.jobs:
                job.revoke(reason)
        ctx.link.send(Drop(rid))
        ctx.calls.do(
            f"cancel {rid}",
            lambda: ctx.store.cancel(rid, reason),
            lambda reply: ctx.hub.send_turns(getattr(reply, "turns", [])),
        )

    def engine_died(self, request: LiveRequest) -> None:
        """Its KV is gone with the engine. `evict` puts the record back into the queue; nothing is called here."""
        self._leave(request, "engine died")
        for job in request.jobs:
            job.retry("the engine process died")

    def unreadable(self, rid: str, jobs: list[JobPort], error: KVStoreError) -> None:
        for job in jobs:
            job.fail(RequestFailed(rid, "bad_record", str(error)))

    def _leave(self, request: LiveRequest, outcome: str) -> None:
        ctx = self._ctx
        request.advance(Phase.ENDED)
        if ctx.live.get(request.rid) is request:
            del ctx.live[request.rid]
        ctx.dirty.discard(request)
        ctx.recent.add(request.rid, request.started_s, outcome)
        log.debug("%s left: %s", request.rid, outcome)


def end_job(job: JobPort, verdict: Stale | Final | Gone) -> None:
    """End a Celery task as the record says that its request ended."""
    match verdict:
        case Final(RequestState.CANCELLED, reason):
            job.revoke(reason or "cancelled")
        case Final(RequestState.EXPIRED, reason):
            job.fail(RequestExpired(job.rid, "expired", reason))
        case Final(RequestState.FAILED, reason):
            job.fail(RequestFailed(job.rid, reason or "failed", ""))
        case Stale():
            job.retry("another worker has taken it over")
        case _:
            job.succeed(_word(verdict))


def _word(verdict: Stale | Final | Gone) -> str:
    match verdict:
        case Final(state, _):
            return state.value.lower()
        case Stale():
            return "taken over"
        case _:
            return "gone"
