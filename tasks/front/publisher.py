"""Publishing: ONE `append_batch` per turn for everything that came, and what each reply asks of us.

Ok           the cursor moves past the item             Gap(n), Dup(n)      the cursor is n; published again from there
Fork         right place, another text: release         Stale, Final, Gone  not ours any more: stop at once
no reply     the cursor stays, the same items go with the next turn
"""

from __future__ import annotations

import logging

from kvstore.errors import KVStoreError, StateUnavailable
from kvstore.state.records import AppendItem
from kvstore.state.replies import AppendReply, Dup, Final, Fork, Gap, Gone, Ok, Stale
from kvstore.state.transitions import RequestState
from tasks.front.context import FrontContext
from tasks.front.ends import RequestEnds
from tasks.front.requests import Choice, LiveRequest, Phase

log = logging.getLogger(__name__)

RETRY_S = 0.1
SLOW_REPLY_S = 0.002  # the server is under load: bigger batches, fewer calls
SLOW_INTERVAL_S = 0.02
TAKEN_PATIENCE_S = 3.0


class PublishPace:
    """How long to collect before the next call: each turn while calls are fast, up to 20 ms while they are slow."""

    def __init__(self) -> None:
        self.interval_s = 0.0

    def measured(self, call_s: float) -> None:
        if call_s > SLOW_REPLY_S:
            self.interval_s = min(max(2 * self.interval_s, SLOW_REPLY_S), SLOW_INTERVAL_S)
        else:
            self.interval_s = 0.0 if self.interval_s < SLOW_REPLY_S else self.interval_s / 2


class Publisher:
    """Output thread."""

    def __init__(self, ctx: FrontContext, ends: RequestEnds) -> None:
        self._ctx = ctx
        self._ends = ends
        self._pace = PublishPace()
        self._not_before_s = 0.0

    def next_s(self) -> float | None:
        """When there is something to do without any message."""
        return self._not_before_s if self._ctx.dirty else None

    def turn(self) -> None:
        """Publish what is dirty, unless it is too early."""
        ctx = self._ctx
        if not ctx.dirty or ctx.clock() < self._not_before_s:
            return
        batch: list[tuple[LiveRequest, Choice, AppendItem]] = []
        for request in list(ctx.dirty):
            items = request.append_items() if request.may_publish else []
            batch += [(request, choice, item) for choice, item in items]
            if not items:
                ctx.dirty.discard(request)  # it comes back with its next token, or with its phase
        if batch:
            self._append(batch)

    def _append(self, batch: list[tuple[LiveRequest, Choice, AppendItem]]) -> None:
        ctx, called_s = self._ctx, self._ctx.clock()
        try:
            replies = ctx.store.append_batch([item for _, _, item in batch])
        except StateUnavailable:
            self._not_before_s = ctx.clock() + RETRY_S
            return
        except KVStoreError:
            self._not_before_s = ctx.clock() + RETRY_S
            raise
        self._pace.measured(ctx.clock() - called_s)
        self._not_before_s = called_s + self._pace.interval_s
        for (request, choice, item), reply in zip(batch, replies, strict=True):
            if request.phase is not Phase.ENDED:
                self._take_reply(request, choice, item, reply)
        for request in {request for request, _, _ in batch}:
            self._settle(request)

    def _take_reply(self, request: LiveRequest, choice: Choice, item: AppendItem, reply: AppendReply) -> None:
        match reply:
            case Ok():
                choice.cursor = item.index + item.count
                choice.is_fin_published = choice.is_fin_published or item.fin is not None
            case Gap(n) | Dup(n):
                choice.cursor = n
                if choice.fin is not None and n > len(choice.ids):
                    # The log went beyond our end: another text of the same length of prefix.
                    self._ends.released(request, "its log holds more than this worker's text")
            case Fork():
                self._ends.released(request, "its log holds another text")
            case Final(RequestState.FINISHED, _) if all(c.is_done for c in request.choices):
                self._ends.finished(request)  # our own last call, whose reply was lost
            case Stale() | Final() | Gone():
                self.verdict(request, reply)

    def _settle(self, request: LiveRequest) -> None:
        if request.phase is Phase.ENDED:
            return
        if request.is_finished:
            self._ends.finished(request)
        elif not any(choice.is_unpublished() for choice in request.choices):
            self._ctx.dirty.discard(request)

    def verdict(self, request: LiveRequest, reply: Stale | Final | Gone) -> None:
        """A call under our token was refused. Also for `renew`."""
        if request.phase is Phase.HANDING and isinstance(reply, Stale):
            return  # our own handoff overtook it: the handoff's reply decides
        if request.phase is Phase.TAKEN and isinstance(reply, Stale):
            return
        if request.is_leaving and isinstance(reply, Stale) and reply.state is RequestState.DECODING:
            self._wait_for_push(request)
        else:
            self._ends.lost(request, reply)

    def _wait_for_push(self, request: LiveRequest) -> None:
        """The receiver's handoff came before the engine's word on the push: that word follows, or we let go."""
        ctx = self._ctx
        request.advance(Phase.TAKEN)
        ctx.dirty.discard(request)

        def let_go() -> None:
            if request.phase is Phase.TAKEN:
                self._ends.finished(request, "taken over")

        ctx.timers.after(TAKEN_PATIENCE_S, let_go)
