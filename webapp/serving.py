"""Serving one accepted call to one client: pieces into bytes or one answer, and a proper end whatever happens."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any, Final

from webapp.errors import ApiError
from webapp.gateway import Gateway
from webapp.openai.answers import Writer
from webapp.openai.pieces import Piece
from webapp.streaming import sse
from webapp.streaming.session import ClientGone, Session, Told

_log = logging.getLogger(__name__)

WRITE_DEADLINE_S: Final = 60.0
TICK_S: Final = 1.0


class Serving:
    """Owned by the thread that serves the call. `close` ends it exactly once, from whichever path comes first.

    Args:
        started_s: when the call arrived, by the gateway's clock.
        keep_running: a client that leaves does not cancel.
        on_close: gives the place of the call back.
    """

    def __init__(
        self,
        gateway: Gateway,
        session: Session,
        writer: Writer,
        *,
        sock: socket.socket | None,
        started_s: float,
        keep_running: bool,
        on_close: Callable[[], None],
    ) -> None:
        self.gateway = gateway
        self.session = session
        self.writer = writer
        self._sock = sock
        self._started_s = started_s
        self._keep_running = keep_running
        self._on_close = on_close
        self._is_closed = False
        self._error: ApiError | None = None
        self._last_token_s: dict[int, float] = {}

    def batches(self, *, tick_s: float) -> Iterator[list[Told]]:
        """The session's batches while the client's socket is watched; measures TTFT and ITL.

        Raises:
            ClientGone, ApiError: as the session.
        """
        with self.gateway.watcher.watch(self._sock, self.session.box.disconnect):
            try:
                for batch in self.session.batches(tick_s=tick_s):
                    self._measure(batch)
                    yield batch
            except ApiError as error:
                self._error = error
                raise

    def stream(self, *, with_ids: bool) -> Iterator[bytes]:
        """The bytes of the stream; each value is one write. Ends with `[DONE]`, always."""
        try:
            # The head goes out with the first byte: within a second, also while the request is queued.
            silent_since_s = self.gateway.clock() + TICK_S - sse.HEARTBEAT_AFTER_S
            for batch in self.batches(tick_s=TICK_S):
                if batch:
                    yield b"".join(self._events(told, with_ids=with_ids) for told in batch)
                    silent_since_s = self.gateway.clock()
                elif self.gateway.clock() - silent_since_s >= sse.HEARTBEAT_AFTER_S:
                    yield sse.HEARTBEAT
                    silent_since_s = self.gateway.clock()
            yield b"".join(sse.data_event(chunk) for chunk in self.writer.last_chunks()) + sse.DONE
        except ClientGone:
            return
        except ApiError as error:
            yield sse.error_event(error.body())
        except GeneratorExit:
            raise
        except Exception:
            _log.exception("stream of request %s met a bug", self.session.rids[0])
            message = f"an error of the server; report it with the id {self.session.rids[0]}"
            self._error = ApiError(500, "internal_error", message)
            yield sse.error_event(self._error.body())
        finally:
            self.close()

    def close(self) -> None:
        """Settles what ended, cancels what nobody waits for. May be called again."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            is_gone = not self.session.has_ended and self._error is None
            self.gateway.finish(
                self.session, error=self._error, is_client_gone=is_gone, keep_running=self._keep_running
            )
            self.gateway.metrics.observe("e2e", self.gateway.clock() - self._started_s)
        finally:
            self._on_close()

    def _events(self, told: Told, *, with_ids: bool) -> bytes:
        chunks = self.writer.chunks(told.index, told.piece)
        last = len(chunks) - 1
        position = told.position if with_ids else ""
        return b"".join(sse.data_event(c, event_id=position if i == last else "") for i, c in enumerate(chunks))

    def _measure(self, batch: list[Told]) -> None:
        if not batch:
            return
        now_s = self.gateway.clock()
        if not self._last_token_s:
            self.gateway.metrics.observe("ttft", now_s - self._started_s)
        for told in batch:
            if told.piece.text:
                if told.index in self._last_token_s:
                    self.gateway.metrics.observe("itl", now_s - self._last_token_s[told.index])
                self._last_token_s[told.index] = now_s


def whole_answer(serving: Serving, num_choices: int) -> dict[str, Any]:
    """Waits for the end of all choices and gives the answer as one object.

    Raises:
        ApiError: a request did not finish; 499 when the client left (nobody reads it).
    """
    pieces: list[list[Piece]] = [[] for _ in range(num_choices)]
    try:
        for batch in serving.batches(tick_s=TICK_S):
            for told in batch:
                pieces[told.index].append(told.piece)
        return serving.writer.answer(pieces)
    except ClientGone as gone:
        raise ApiError(499, "cancelled", "the client closed its connection") from gone
    finally:
        serving.close()
