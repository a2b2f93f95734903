"""What this worker measures of the phases of its requests (`kvstore.state.phases`), written into their records.

Nothing waits for these calls: they go out together when the tokens of the turn are published. A record without them
lacks a line of its timings, nothing else.
"""

from __future__ import annotations

from engines.messages import Pushed, Stepped
from kvstore.state.phases import DecodeSpans, PrefillSpans, Spans
from kvstore.state.records import SpansItem
from tasks.front.calls import CallGroup
from tasks.front.context import FrontContext
from tasks.front.requests import LiveRequest

NUM_FIRST_PROBES = 5  # one slow answer must not spoil what the first requests are measured by
WRITE_AFTER_S = 0.005  # the turn's tokens go first


class PhaseSpans:
    """Output thread. Without an answer of the state server's clock nothing is written."""

    def __init__(self, ctx: FrontContext) -> None:
        self._ctx = ctx
        self._writes = CallGroup(ctx.store.set_spans_each)

    def probe(self) -> None:
        """Ask for the server's time; at each beat.

        Raises:
            StateUnavailable, StateError: as any call.
        """
        ctx = self._ctx
        for _ in range(1 if ctx.server_clock.is_known else NUM_FIRST_PROBES):
            sent_s = ctx.clock()
            server_ms = ctx.store.server_time_ms()
            ctx.server_clock.note(sent_s=sent_s, replied_s=ctx.clock(), server_ms=server_ms)

    def pushed(self, request: LiveRequest, message: Pushed) -> None:
        """A prompt that was computed here is another worker's now."""
        computed_ms = self._ctx.server_clock.server_ms(message.computed_s)
        if computed_ms is not None:
            spans = PrefillSpans(
                epoch=request.epoch,
                prefill_ms=(message.computed_s - message.granted_s) * 1000,
                computed_ms=computed_ms,
                reserve_ms=(message.granted_s - request.claimed_s) * 1000,
            )
            self._write(request.rid, spans)

    def handed_to_self(self, request: LiveRequest, computed_s: float) -> None:
        """Role both: its first token was here at `computed_s`, and it stays."""
        computed_ms = self._ctx.server_clock.server_ms(computed_s)
        if computed_ms is not None:
            prefill_ms = (computed_s - request.claimed_s) * 1000
            self._write(request.rid, PrefillSpans(request.epoch, prefill_ms, computed_ms))

    def on_stepped(self, message: Stepped) -> None:
        """The first decode step of a sequence that was handed to us is over."""
        clock = self._ctx.server_clock
        verified_ms, stepped_ms = clock.server_ms(message.verified_s), clock.server_ms(message.ended_s)
        if verified_ms is None or stepped_ms is None:
            return
        is_here = message.computed_s is not None
        spans = DecodeSpans(
            epoch=message.epoch,
            decode_wait_ms=(message.began_s - message.verified_s) * 1000,
            first_step_ms=(message.ended_s - message.began_s) * 1000,
            verified_ms=verified_ms,
            stepped_ms=stepped_ms,
            transfer_ms=(message.verified_s - (message.computed_s or 0.0)) * 1000 if is_here else None,
        )
        self._write(message.rid, spans)

    def _write(self, rid: str, spans: Spans) -> None:
        ctx = self._ctx

        def write() -> None:
            ctx.calls.gather(f"spans of {rid}", self._writes, SpansItem(rid, spans), lambda _: None)

        ctx.timers.after(WRITE_AFTER_S, write)
