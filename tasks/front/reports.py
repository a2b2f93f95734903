"""What the engine says of requests: tokens, grants, the end of a push, and that it had to let one go."""

from __future__ import annotations

import logging

from engines.messages import Failed, Granted, NoGrant, Owner, Preempted, Pushed, Stop, Tokens
from kvstore.state.records import HandoffItem
from kvstore.state.replies import Final, Gone, HandedOff, Stale
from tasks.front.calls import CallGroup
from tasks.front.context import FrontContext
from tasks.front.ends import NO_PAGES_WAIT_S, RequestEnds
from tasks.front.peers import PeerTable
from tasks.front.requests import LiveRequest, Phase, set_cursors
from tasks.front.spans import PhaseSpans
from tasks.names import decode_queue

MAX_ENGINE_ATTEMPTS = 3  # an engine error that may pass does not pass for ever

log = logging.getLogger(__name__)


class EngineReports:
    """Output thread. A report of a request that has left meanwhile is ignored: the engine was told to drop it."""

    def __init__(self, ctx: FrontContext, ends: RequestEnds, peers: PeerTable, spans: PhaseSpans) -> None:
        self._ctx = ctx
        self._ends = ends
        self._peers = peers
        self._spans = spans
        self._handoffs: CallGroup[HandoffItem, HandedOff | Stale | Final | Gone] = CallGroup(ctx.store.handoff_each)

    def on_tokens(self, message: Tokens) -> None:
        ctx = self._ctx
        for out in message.outs:
            request = ctx.live.get(out.rid)
            if request is None or out.epoch != request.engine_epoch:
                continue  # it left while the step ran, and may be back
            try:
                is_stopped = request.choices[out.c].extend(out)
            except ValueError as error:
                log.error("%s", error)
                self._ends.released(request, "the engine and this worker's text disagree")
                continue
            if is_stopped:
                ctx.link.send(Stop(out.rid, out.c))
            ctx.dirty.add(request)
            if request.mode == "local" and request.phase is Phase.COMPUTING:
                self._hand_to_self(request)

    def _hand_to_self(self, request: LiveRequest) -> None:
        """Role both: prompt computed, from here on it decodes, under a token of its own."""
        ctx, rid = self._ctx, request.rid
        token, computed_s = ctx.identity.next_token(), ctx.clock()
        request.advance(Phase.HANDING)

        def answered(reply: HandedOff | Stale | Final | Gone) -> None:
            if request.phase is Phase.ENDED:
                if isinstance(reply, HandedOff):
                    self._ends.give_back(rid, reply.epoch, token)
                return
            if not isinstance(reply, HandedOff):
                self._ends.lost(request, reply)
                return
            request.epoch, request.token = reply.epoch, token
            request.advance(Phase.DECODING)
            set_cursors(request, reply)
            ctx.dirty.add(request)
            ctx.link.send(Owner(rid, reply.epoch, token))
            self._spans.handed_to_self(request, computed_s)

        item = HandoffItem(rid, request.epoch, request.token, token)
        ctx.calls.gather(f"handoff {rid} to itself", self._handoffs, item, answered)

    def on_granted(self, message: Granted) -> None:
        """A decode worker promised blocks: show its Celery task there while the prompt is computed, or it moves."""
        ctx, request = self._ctx, self._ctx.live.get(message.rid)
        if request is None:
            return
        request.is_moving = request.phase is Phase.DECODING
        self._peers.assign(message.node)
        queue = decode_queue(ctx.model, message.node)
        remaining_s = max(request.deadline_s - ctx.clock(), 0.0)
        # A task id is never used twice: one that was handed to us has no wake number, and its epoch only grows.
        ctx.hub.send_decode(request.rid, request.wake_n or request.epoch, message.attempt, queue, remaining_s)

    def on_no_grant(self, message: NoGrant) -> None:
        request = self._ctx.live.get(message.rid)
        if request is not None:
            self._ends.released(request, f"no grant: {message.reason}", wait_s=NO_PAGES_WAIT_S)

    def on_preempted(self, message: Preempted) -> None:
        request = self._ctx.live.get(message.rid)
        if request is not None:
            self._ends.released(request, "preempted: the KV blocks ran out", wait_s=NO_PAGES_WAIT_S)

    def on_pushed(self, message: Pushed) -> None:
        """The end of a push. HANDED: the decode worker owns it; what we could not publish came to it with the KV."""
        request = self._ctx.live.get(message.rid)
        if request is None or not (request.mode == "push" or request.is_moving):
            return
        if request.phase is not Phase.TAKEN and all(choice.is_done for choice in request.choices):
            return  # finished at prefill: the last append ends it
        if message.outcome == "handed" or request.phase is Phase.TAKEN:
            is_from_prefill = request.mode == "push"
            self._ends.finished(request, "handed")
            if is_from_prefill:
                self._spans.pushed(request, message)
        else:
            self._ends.released(request, f"push {message.outcome}: {message.reason}", wait_s=NO_PAGES_WAIT_S)

    def on_failed(self, message: Failed) -> None:
        request = self._ctx.live.get(message.rid)
        if request is None:
            return
        if message.is_retryable and request.attempts < MAX_ENGINE_ATTEMPTS:
            log.warning("%s goes back to the queue: %s", message.rid, message.message)
            self._ends.released(request, f"engine: {message.message}", wait_s=NO_PAGES_WAIT_S)
        else:
            self._ends.failed(request, message.code, message.message)
