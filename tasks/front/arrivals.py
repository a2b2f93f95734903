"""Sequences that are handed to this worker, and the `decode` tasks that show them.

Incoming   a prefill worker has blocks here; its Celery task decode(rid) will come, or is here already
Arrived    KV complete and verified: `handoff`, of all that came in one turn together, then Promote (it joins the next
           step) or Drop
decode(rid) before Arrived: waits for it; after: shows it; unknown: kept 2 s, then only acked
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial

from engines.messages import ArrivalLost, Arrived, Drop, Incoming, Promote, Stop
from kvstore.state.records import HandoffItem, Record
from kvstore.state.replies import Final, Gone, HandedOff, Stale
from kvstore.state.transitions import RequestState
from tasks.front.calls import CallGroup
from tasks.front.context import FrontContext
from tasks.front.ends import RequestEnds, end_job
from tasks.front.ports import JobPort
from tasks.front.requests import LiveRequest, Phase, restore_choices, set_cursors

UNKNOWN_KEPT_S = 2.0
LOGPROBS_WAIT_S = 0.25
PROMPT_LOGPROBS_WAIT_S = 2.0  # megabytes for a long prompt
LOGPROBS_LOOK_S = 0.01


class Arrivals:
    """Output thread."""

    def __init__(self, ctx: FrontContext, ends: RequestEnds) -> None:
        self._ctx = ctx
        self._ends = ends
        self._handoffs: CallGroup[HandoffItem, HandedOff | Stale | Final | Gone] = CallGroup(
            ctx.store.handoff_each, replying=ctx.link.held
        )
        self._expected: dict[str, set[str]] = defaultdict(set)  # rid -> xfers promised or arrived, not settled
        self._waiting: dict[str, list[JobPort]] = {}  # rid -> decode tasks that came first

    @property
    def num_pending(self) -> int:
        return len(self._expected)

    # ---------------------------------------------------------------- Celery's side
    def submit(self, job: JobPort) -> None:
        """A message decode(rid)."""
        ctx, rid = self._ctx, job.rid
        request = ctx.live.get(rid)
        recent = ctx.recent.get(rid)
        if request is not None:
            request.jobs.append(job)
            job.accept(request.started_s)
        elif rid in self._expected:
            self._waiting.setdefault(rid, []).append(job)
        elif recent is not None:  # it was faster than its message
            started_s, outcome = recent
            job.accept(started_s)
            job.succeed(outcome)
        else:
            self._waiting.setdefault(rid, []).append(job)
            ctx.timers.after(UNKNOWN_KEPT_S, partial(self._ack_if_unknown, rid, job))

    def _ack_if_unknown(self, rid: str, job: JobPort) -> None:
        jobs = self._waiting.get(rid, [])
        if job in jobs and rid not in self._expected:
            jobs.remove(job)
            if not jobs:
                del self._waiting[rid]
            job.succeed("no arrival")

    def cancel(self, rid: str) -> list[JobPort]:
        """Forget the tasks of a cancelled request; its arrival is refused by the record."""
        return self._waiting.pop(rid, [])

    # ---------------------------------------------------------------- the engine's side
    def on_incoming(self, message: Incoming) -> None:
        self._expected[message.rid].add(message.xfer)

    def on_lost(self, message: ArrivalLost) -> None:
        self._settled(message.rid, message.xfer)
        for job in self._unclaimed(message.rid):
            job.succeed("arrival lost")

    def on_arrived(self, message: Arrived) -> None:
        self._expected[message.rid].add(message.xfer)
        if message.params.logprobs is None and message.params.prompt_logprobs is None:
            self._hand_off(message)
        else:
            wait_s = LOGPROBS_WAIT_S if message.params.prompt_logprobs is None else PROMPT_LOGPROBS_WAIT_S
            self._after_first_tokens(message, until_s=self._ctx.clock() + wait_s)

    def _after_first_tokens(self, message: Arrived, *, until_s: float) -> None:
        """The KV brings ids but no logprobs: let the prefill worker publish its tokens with theirs first."""
        ctx = self._ctx

        def looked(record: Record | None) -> None:
            is_there = record is not None and all(
                n >= len(ids) for n, ids in zip(record.n, message.choices, strict=True)
            )
            is_late = ctx.clock() > until_s
            if is_late and not is_there and message.params.prompt_logprobs is not None:
                # Nobody but the prefill worker has them: the request goes back and its prompt is computed again.
                self._refuse(message, Stale(message.epoch, RequestState.PREFILLING))
            elif is_there or is_late:
                self._hand_off(message)
            else:
                ctx.timers.after(LOGPROBS_LOOK_S, partial(self._after_first_tokens, message, until_s=until_s))

        ctx.calls.do(
            f"look at {message.rid}",
            lambda: ctx.store.record(message.rid),
            looked,
            lambda _: self._hand_off(message),
        )

    def _hand_off(self, message: Arrived) -> None:
        ctx = self._ctx
        former = ctx.live.get(message.rid)
        if former is not None and former.epoch < message.epoch:
            # A newer epoch exists, so what we hold is stale, and the engine knows both by the request id: let go of
            # both. The writer is told REFUSED and gives the request back.
            self._ends.lost(former, Stale(message.epoch, former.state))
            self._settled(message.rid, message.xfer)
            return
        token = ctx.identity.next_token()
        ctx.calls.gather(
            f"handoff {message.rid}",
            self._handoffs,
            HandoffItem(message.rid, message.epoch, message.from_token, token),
            partial(self._handed, message, token, ctx.identity.incarnation),
            lambda _: self._refuse(message, Gone()),
        )

    def _handed(self, message: Arrived, token: str, incarnation: str, reply: HandedOff | Stale | Final | Gone) -> None:
        ctx = self._ctx
        if incarnation != ctx.identity.incarnation:  # the engine and the KV died while the call was out
            if isinstance(reply, HandedOff):
                self._ends.give_back(message.rid, reply.epoch, token)
            return
        if not isinstance(reply, HandedOff):
            self._refuse(message, reply)
            return
        self._settled(message.rid, message.xfer)
        former = ctx.live.get(message.rid)
        if former is not None:  # another arrival of it was handed over while this call waited: as in `_hand_off`
            self._ends.lost(former, Stale(reply.epoch, former.state))
            self._ends.give_back(message.rid, reply.epoch, token)
            return
        now = ctx.clock()
        request = LiveRequest(
            rid=message.rid,
            epoch=reply.epoch,
            token=token,
            mode="arrived",
            phase=Phase.DECODING,
            choices=restore_choices(ctx.tokenizer, message.params, message.choices),
            wake_n=0,
            deadline_s=now + message.deadline_s,
            started_s=now,
            engine_epoch=reply.epoch,
            jobs=self._waiting.pop(message.rid, []),
        )
        set_cursors(request, reply)
        ctx.live[message.rid] = request
        ctx.link.send(Promote(message.rid, message.xfer, reply.epoch, token))
        for choice in request.choices:
            if choice.is_done:  # by a stop string, which the engine cannot see
                ctx.link.send(Stop(message.rid, choice.index))
        for job in request.jobs:
            job.accept(now)
        ctx.dirty.add(request)  # first tokens that the prefill worker could not publish

    def _refuse(self, message: Arrived, verdict: Stale | Final | Gone) -> None:
        self._settled(message.rid, message.xfer)
        self._ctx.link.send(Drop(message.rid, message.xfer))
        for job in self._unclaimed(message.rid):
            end_job(job, verdict)

    # ---------------------------------------------------------------- ends
    def engine_died(self) -> None:
        self._expected.clear()
        waiting, self._waiting = self._waiting, {}
        for jobs in waiting.values():
            for job in jobs:
                job.retry("the engine process died")

    def _settled(self, rid: str, xfer: str) -> None:
        xfers = self._expected.get(rid)
        if xfers is not None:
            xfers.discard(xfer)
            if not xfers:
                del self._expected[rid]

    def _unclaimed(self, rid: str) -> list[JobPort]:
        """Tasks that wait for `rid`, if no other arrival of it is on its way."""
        return [] if rid in self._expected else self._waiting.pop(rid, [])
