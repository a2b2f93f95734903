"""The gateway process: what it owns, and the life of a call in it.

    submit()  writes a record per prompt, sends wake-ups, opens a Session (told before the first byte)
    session   followed by the serving thread, fed by thread `feed-reader`
    finish()  after the terminal event: settle; the client left or an error: cancel, revoke

Threads: feed-reader, socket-watcher, settler, reaper, and one of gunicorn's per call in work. `start` after a fork.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

from configs.schema import Settings
from kvstore.clock import Clock, now_s
from kvstore.errors import KVStoreError, StateUnavailable
from kvstore.state.records import NewRequest, Record
from kvstore.state.replies import Cancelled, Turn
from kvstore.state.store import StateStore
from webapp.admission import RESERVED_THREADS, Admission
from webapp.errors import ApiError, Overloaded
from webapp.metrics import GatewayMetrics
from webapp.openai.call import Call, CallNotes
from webapp.openai.served_model import ServedModel
from webapp.streaming.follower import SILENCE_S, Follower
from webapp.streaming.mailbox import FeedReader, Mailbox
from webapp.streaming.position import Position
from webapp.streaming.session import Session
from webapp.streaming.settling import Settler
from webapp.streaming.sockets import SocketWatcher

_log = logging.getLogger(__name__)

ACCEPT_TRIES_S: Final = 5.0
WORKERS_EVERY_S: Final = 1.0
DRAIN_GRACE_S: Final = 3.0  # streams that end by themselves meanwhile need no error event
SETTLED: Final = "settled:"
_encode: Final = msgspec.msgpack.Encoder().encode
_decode_notes: Final = msgspec.msgpack.Decoder(CallNotes).decode


class Sender(Protocol):
    """What the gateway calls of `tasks.wakeups.WakeupSender`."""

    def send(self, turns: Sequence[Turn], store: StateStore, *, remaining_s: float | None = None) -> None: ...
    def revoke_turns(self, turns: Sequence[Turn]) -> None: ...


class Thread(Protocol):
    def start(self) -> None: ...
    def stop(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a gateway is made of; tests give their own sender."""

    store: StateStore
    model: ServedModel
    sender: Sender
    secret: bytes
    reaper: Thread | None = None


class Gateway:
    """One per process. Thread-safe."""

    def __init__(self, settings: Settings, parts: Parts, *, clock: Clock = now_s) -> None:
        self.settings = settings
        self.store = parts.store
        self.model = parts.model
        self.secret = parts.secret
        self.clock = clock
        self.name = f"gw-{socket.gethostname()}-{secrets.token_hex(4)}"
        self.metrics = GatewayMetrics(parts.store)
        self.admission = Admission(limit=max(1, settings.gateway.threads - RESERVED_THREADS), clock=clock)
        self.reader = FeedReader(parts.store, self.name)
        self.watcher = SocketWatcher()
        self.settler = Settler(self._settle)
        self._sender = parts.sender
        self._reaper = parts.reaper
        self._workers_at_s = -WORKERS_EVERY_S
        self._drained_at_s: float | None = None
        self._unobserved: set[str] = set()

    def start(self) -> None:
        self.reader.start()
        self.watcher.start()
        self.settler.start()
        if self._reaper is not None:
            self._reaper.start()

    def stop(self) -> None:
        """Reaper first: a wake-up sent now would still be right, but its store is about to close."""
        if self._reaper is not None:
            self._reaper.stop()
        self.reader.stop()
        self.watcher.stop()
        self.settler.stop()
        self.store.close()

    def begin_drain(self) -> None:
        """No new calls; open streams end with an error event in 3 s. Safe in a signal handler: takes no lock."""
        self.admission.is_draining = True
        if self._drained_at_s is None:
            self._drained_at_s = self.clock() + DRAIN_GRACE_S

    @property
    def is_drain_over(self) -> bool:
        return self._drained_at_s is not None and self.clock() >= self._drained_at_s

    # ------------------------------------------------------------------ calls
    def admit(self) -> None:
        """A place for one call; `admission.leave` gives it back.

        Raises:
            Overloaded: see `Admission.admit`.
        """
        if self.clock() - self._workers_at_s >= WORKERS_EVERY_S:
            try:
                if beats := self.store.workers():
                    self.admission.worker_seen()
                    self.model = self.model.as_served_by(beats)
            except KVStoreError:
                self.admission.worker_seen()  # unknown is no reason to refuse
            # Only now: calls that come meanwhile look, too, or a burst after an idle time would be refused.
            self._workers_at_s = self.clock()
        self.admission.admit()

    def submit(self, call: Call, *, timeout_s: float, body_hash: str) -> Session:
        """Accepts the requests of a checked call. From here on each has exactly one end.

        Raises:
            Overloaded: the state server did not answer in time; nothing is running.
        """
        seed = call.seed if call.seed is not None else secrets.randbits(63)
        box = Mailbox()
        followers: list[Follower] = []
        new = [self._new_request(call, i, seed, timeout_s, body_hash) for i in range(len(call.prompts))]
        for request in new:
            followers.append(self._follower(request.rid, request.k, timeout_s, request=request))
        session = self._session(followers, box)
        accepted: list[str] = []
        try:
            for request in new:
                accepted.append(request.rid)
                reply = self._accept(request)
                self._sender.send(reply, self.store, remaining_s=timeout_s)
                self.metrics.prompt_tokens.inc(len(request.prompt_ids))
        except Exception:
            session.close()
            for rid in accepted:
                self.cancel(rid, "gateway_error")
            raise
        return session

    def follow(self, record: Record, position: Position | None) -> Session:
        """A session for a request that was accepted before, here or at another gateway."""
        notes = self.notes_of(record)
        timeout_s = self.settings.gateway.default_timeout_s
        follower = self._follower(record.rid, record.body.k, timeout_s, request=None, at_once=True)
        session = self._session([follower], Mailbox(), first_index=notes.prompt_index * record.body.k)
        if position is not None:
            session.resume(position)
        return session

    def finish(self, session: Session, *, error: ApiError | None, is_client_gone: bool, keep_running: bool) -> None:
        """After the last byte, whatever it was."""
        session.close()
        for follower in session.followers:
            if follower.has_ended:
                state = follower.end_state
                self.metrics.ended.labels(state.lower()).inc()
                self.metrics.output_tokens.inc(sum(cursor.held for cursor in follower.cursors))
                self._unobserved.add(follower.rid)
                self.settler.settle(follower.rid, SETTLED + state)
            elif is_client_gone and not keep_running:
                self.metrics.ended.labels("cancelled").inc()
                self.cancel(follower.rid, "client_gone")
            elif error is not None and error.code != "draining":
                self.metrics.ended.labels("failed").inc()
                self.cancel(follower.rid, error.code)

    def cancel(self, rid: str, reason: str) -> object:
        """Ends a request now, and says so again after 1, 2 and 4 s.

        Returns the reply, or None where the state server did not answer (the later calls will).
        """
        self.settler.settle(rid, reason)
        try:
            reply = self.store.cancel(rid, reason)
        except KVStoreError as error:
            _log.warning("request %s: cancel will be repeated: %s", rid, error)
            return None
        if isinstance(reply, Cancelled):
            self._sender.revoke_turns([Turn(rid, reply.wake_n)])
            self._sender.send(reply.turns, self.store)
        return reply

    @staticmethod
    def notes_of(record: Record) -> CallNotes:
        """How the answer of this request is written."""
        return _decode_notes(record.body.meta)

    # ------------------------------------------------------------------ private
    def _new_request(self, call: Call, i: int, seed: int, timeout_s: float, body_hash: str) -> NewRequest:
        prompt, params = call.prompts[i], call.params[i]
        notes = msgspec.structs.replace(call.notes, prompt_index=i, echo=prompt.echo)
        return NewRequest(
            rid=self.store.new_request_id(),
            model=self.model.name,
            tenant="default",
            priority=call.priority,
            deadline_in_s=timeout_s,
            seed=seed,
            k=params.n,
            params=_encode(params),
            prompt_ids=prompt.token_ids,
            gateway=self.name,
            body_hash=body_hash,
            meta=_encode(notes),
        )

    def _accept(self, request: NewRequest) -> list[Turn]:
        end_s = self.clock() + ACCEPT_TRIES_S
        while True:
            try:
                return self.store.accept(request).turns
            except StateUnavailable as error:
                if self.clock() >= end_s:
                    message = "the state server cannot be reached; try again later"
                    raise Overloaded("not_ready", message, retry_after_s=2) from error
                time.sleep(0.1)

    def _follower(
        self, rid: str, k: int, timeout_s: float, *, request: NewRequest | None, at_once: bool = False
    ) -> Follower:
        return Follower(
            self.store,
            rid,
            self.name,
            k=k,
            deadline_s=self.clock() + timeout_s,
            clock=self.clock,
            send_turns=self._send_turns,
            request=request,
            first_look_s=0.0 if at_once else SILENCE_S,
        )

    def _session(self, followers: list[Follower], box: Mailbox, *, first_index: int = 0) -> Session:
        return Session(
            followers,
            reader=self.reader,
            box=box,
            clock=self.clock,
            secret=self.secret,
            is_draining=lambda: self.is_drain_over,
            first_index=first_index,
        )

    @property
    def _send_turns(self) -> Callable[[list[Turn]], None]:
        return lambda turns: self._sender.send(turns, self.store)

    def _settle(self, rid: str, reason: str) -> None:
        """One of the later calls. The first also reads the phases of the record, off the hot path."""
        self.store.cancel(rid, reason)
        if rid in self._unobserved:
            self._unobserved.discard(rid)
            record = self.store.record(rid)
            if record is not None:
                self.metrics.observe_record(record)
