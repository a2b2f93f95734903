"""Driving one stream, in virtual time: heartbeats, the end, and what happens after it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from kvstore.clock import VirtualClock
from kvstore.state.entries import FinEntry
from webapp.errors import ApiError, StreamFailed
from webapp.openai.pieces import Piece
from webapp.serving import Serving
from webapp.streaming import sse
from webapp.streaming.mailbox import Mailbox
from webapp.streaming.session import ClientGone, Told
from webapp.streaming.sockets import SocketWatcher

END = Told(0, Piece(0, "", (), 1, FinEntry("FINISHED", "stop"), True))


class ScriptedSession:
    """Batches as told; each takes a second. An error in the script is raised."""

    def __init__(self, clock: VirtualClock, script: list[list[Told] | Exception]) -> None:
        self.box = Mailbox()
        self.rids = ["a-s00"]
        self.has_ended = False
        self._clock = clock
        self._script = script

    def batches(self, *, tick_s: float) -> Iterator[list[Told]]:
        for batch in self._script:
            self._clock.advance(tick_s)
            if isinstance(batch, Exception):
                raise batch
            yield batch
        self.has_ended = True


def _run(script: list[list[Told] | Exception]) -> tuple[list[bytes], list[dict[str, Any]]]:
    """The writes of a stream, and the calls of `finish`."""
    clock, finished = VirtualClock(), []
    gateway: Any = SimpleNamespace(
        clock=clock,
        watcher=SocketWatcher(),
        metrics=SimpleNamespace(observe=lambda _phase, _seconds: None),
        finish=lambda _session, **how: finished.append(how),
    )
    writer: Any = SimpleNamespace(chunks=lambda index, _piece: [{"index": index}], last_chunks=list)
    session: Any = ScriptedSession(clock, script)
    serving = Serving(
        gateway, session, writer, sock=None, started_s=0.0, keep_running=False, on_close=lambda: finished.append({})
    )
    writes = list(serving.stream(with_ids=False))
    serving.close()
    return writes, finished


def test_the_head_goes_out_within_a_second_then_a_heartbeat_each_fifteen() -> None:
    writes, _ = _run([[] for _ in range(31)] + [[END]])
    assert writes[:-2] == [sse.HEARTBEAT] * 3
    assert writes[-2:] == [b'data: {"index":0}\n\n', sse.DONE]


def test_a_batch_is_one_write_and_the_call_is_closed_once() -> None:
    writes, finished = _run([[END, END]])
    assert writes == [b'data: {"index":0}\n\n' * 2, sse.DONE]
    assert finished == [{"error": None, "is_client_gone": False, "keep_running": False}, {}]


def test_a_failure_becomes_an_error_event_and_done() -> None:
    error = StreamFailed(502, "upstream_failed", "lost")
    writes, finished = _run([[END], error])
    assert writes[-1] == sse.error_event(error.body())
    assert finished[0]["error"] is error


def test_a_bug_ends_the_stream_properly_too() -> None:
    writes, finished = _run([RuntimeError("a bug")])
    assert b'"internal_error"' in writes[-1]
    assert writes[-1].endswith(sse.DONE)
    assert isinstance(finished[0]["error"], ApiError)


def test_a_client_that_left_is_told_nothing() -> None:
    writes, finished = _run([ClientGone()])
    assert writes == []
    assert finished[0]["is_client_gone"] is True
