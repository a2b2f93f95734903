"""Following ONE accepted request to its end, through hints, lost hints, lost records and outages.

    hint (feed) ──> take it if it joins what is held ──┐
    1 s of silence, a gap, a fork ──> attach + log ────┴──> TokensCame, ChoiceEnded
    record gone ──> accept again + refill (at most 3 times)          log is another text ──> stream_diverged

The client sees each token once, in order, and one end per choice. An unreachable state server is waited for until the
deadline: the tokens are still there afterwards. After docs/protocol.md, sections 4, 5 and 8.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

from kvstore.clock import Clock
from kvstore.errors import BadRecord, StateUnavailable
from kvstore.state.entries import FeedItem, FinEntry, TokenEntry
from kvstore.state.records import NewRequest
from kvstore.state.replies import Accepted, At, Attached, Gone, Log, Ok, Turn
from kvstore.state.replies import Final as Ended
from kvstore.state.transitions import RequestState
from webapp.errors import StreamFailed
from webapp.streaming.position import ChoiceCursor, Position, Verdict, digest_of

_log = logging.getLogger(__name__)

SILENCE_S: Final = 1.0
RETRY_S: Final = 0.25
MAX_ACCEPTS_AGAIN: Final = 3
DEADLINE_SLACK_S: Final = 2.0  # the functions end it first; only an outage lets our own clock decide
_decode_tokens: Final = msgspec.msgpack.Decoder(TokenEntry).decode
_decode_fin: Final = msgspec.msgpack.Decoder(FinEntry).decode


class State(Protocol):
    """What a follower calls of `kvstore.state.StateStore`."""

    def accept(self, request: NewRequest) -> Accepted: ...
    def attach(self, rid: str, gateway: str) -> Attached | Gone: ...
    def read_log(self, rid: str, c: int, after_n: int) -> Log: ...
    def refill(self, rid: str, c: int, entry: TokenEntry, *, new_hash: int) -> Ok | At | Ended | Gone: ...


@dataclass(frozen=True)
class TokensCame:
    c: int
    entry: TokenEntry


@dataclass(frozen=True)
class ChoiceEnded:
    c: int
    fin: FinEntry


Came = TokensCame | ChoiceEnded


class Follower:
    """One request's reader. Owned by the thread that serves it; `offer` and `look` may raise StreamFailed.

    Args:
        request: to accept again if the record is lost; None for a reader that came later.
        deadline_s: by `clock`.
        send_turns: sends wake-ups.
        first_look_s: `accept` has attached already, so only who comes later must look at once.
    """

    def __init__(
        self,
        store: State,
        rid: str,
        gateway: str,
        *,
        k: int,
        deadline_s: float,
        clock: Clock,
        send_turns: Callable[[list[Turn]], None],
        request: NewRequest | None = None,
        first_look_s: float = 0.0,
    ) -> None:
        self.rid = rid
        self.cursors = [ChoiceCursor(c) for c in range(k)]
        self._store = store
        self._gateway = gateway
        self._deadline_s = deadline_s
        self._clock = clock
        self._send_turns = send_turns
        self._request = request
        self._num_accepts_again = 0
        self._look_at_s = clock() + first_look_s
        self._resume: Position | None = None

    @property
    def has_ended(self) -> bool:
        return all(cursor.has_ended for cursor in self.cursors)

    @property
    def end_state(self) -> str:
        """The state of the first choice that did not finish, else FINISHED."""
        states = [cursor.fin.state for cursor in self.cursors if cursor.fin is not None]
        return next((s for s in states if s != RequestState.FINISHED), RequestState.FINISHED.value)

    def look_in_s(self) -> float:
        """Seconds until `look` is due without a hint."""
        return max(0.0, self._look_at_s - self._clock())

    def resume_at(self, position: Position) -> None:
        """The client holds `position` already: nothing before it is reported, but it is read and compared."""
        self._resume = position

    # ------------------------------------------------------------------ hints
    def offer(self, item: FeedItem) -> list[Came]:
        """Takes a hint. What does not join what is held is read from the log."""
        if self._resume is not None:
            return []  # the log comes first
        cursor = self.cursors[item.c] if 0 <= item.c < len(self.cursors) else None
        if cursor is None or cursor.has_ended:
            return []
        self._look_at_s = self._clock() + SILENCE_S
        came: list[Came] = []
        if item.tokens:
            try:
                verdict, new = cursor.take(_decode_tokens(item.tokens))
            except msgspec.DecodeError:
                return self.look()
            if verdict in (Verdict.GAP, Verdict.FORK):
                return self.look()
            came += self._told(cursor, new)
        if item.n > cursor.held:
            return came + self.look()
        if item.fin and item.n == cursor.held:
            came += self._end(cursor, _decode_fin(item.fin))
        return came

    # ------------------------------------------------------------------ the log
    def look(self) -> list[Came]:
        """Attaches and reads what the logs have beyond what is held.

        Raises:
            StreamFailed: gone for good, diverged, or past its deadline with no state server.
        """
        came: list[Came] = []
        try:
            self._look_at_s = self._clock() + SILENCE_S
            reply = self._store.attach(self.rid, self._gateway)
            if isinstance(reply, Gone):
                self._accept_again(reply)
                reply = self._store.attach(self.rid, self._gateway)
            if isinstance(reply, Gone):
                self._look_at_s = self._clock() + RETRY_S
                return came
            if self._resume is not None and not self._catch_up(reply, self._resume):
                return came
            for cursor in self.cursors:
                if not cursor.has_ended:
                    self._look_at(cursor, reply, came)
        except StateUnavailable as error:
            self._look_at_s = self._clock() + RETRY_S
            if self._clock() > self._deadline_s + DEADLINE_SLACK_S:
                message = "the deadline passed while the state server could not be reached; try again"
                raise StreamFailed(504, "deadline_exceeded", message) from error
            _log.debug("request %s: waiting for the state server: %s", self.rid, error)
        except BadRecord as error:
            raise StreamFailed(500, "internal_error", f"request {self.rid} has an unreadable record") from error
        return came

    def _look_at(self, cursor: ChoiceCursor, reply: Attached, came: list[Came]) -> None:
        n, is_final = reply.n[cursor.c], reply.final
        if n < cursor.held:
            if not is_final:
                self._refill(cursor, n, came)
                return
            if reply.state == RequestState.FINISHED:
                raise self._diverged()
        elif n > cursor.held or reply.fin[cursor.c] or is_final:
            self._take_log(cursor, self._store.read_log(self.rid, cursor.c, cursor.held), came)
        if is_final and not cursor.has_ended:
            came += self._end(cursor, FinEntry(reply.state.value, reply.reason))

    def _take_log(self, cursor: ChoiceCursor, log: Log, came: list[Came]) -> None:
        for entry in log.entries:
            verdict, new = cursor.take(entry)
            if verdict in (Verdict.GAP, Verdict.FORK):
                self._compare(cursor)
                raise self._diverged()
            came += self._told(cursor, new)
        if log.fin is not None:
            came += self._end(cursor, log.fin)

    def _refill(self, cursor: ChoiceCursor, n: int, came: list[Came]) -> None:
        """The server lost a tail that this client has: put it back, or prove that the log is another text."""
        self._compare(cursor)
        reply = self._store.refill(self.rid, cursor.c, cursor.entry_from(n), new_hash=cursor.hashes[-1])
        if isinstance(reply, At):
            self._compare(cursor)
            self._take_log(cursor, self._store.read_log(self.rid, cursor.c, cursor.held), came)
        self._look_at_s = self._clock() + RETRY_S

    def _compare(self, cursor: ChoiceCursor) -> None:
        ids = _ids_of(self._store.read_log(self.rid, cursor.c, 0).entries)
        if not cursor.agrees_with(ids):
            raise self._diverged()

    # ------------------------------------------------------------------ lost records, resumed clients
    def _accept_again(self, gone: Gone) -> None:
        if gone.bad_record:
            raise StreamFailed(500, "internal_error", f"request {self.rid} has an unreadable record")
        remaining_s = self._deadline_s - self._clock()
        if self._request is None:
            raise StreamFailed(410, "stream_expired", f"request {self.rid} is not kept any more")
        if self._num_accepts_again >= MAX_ACCEPTS_AGAIN or remaining_s <= 0:
            message = f"the record of request {self.rid} was lost {self._num_accepts_again + 1} times; send it again"
            raise StreamFailed(503, "not_ready", message)
        _log.warning("request %s: its record is gone; accepting it again", self.rid)
        accepted = self._store.accept(dataclasses.replace(self._request, deadline_in_s=remaining_s))
        self._num_accepts_again += 1  # only now: a call without a reply is repeated
        self._send_turns(accepted.turns)

    def _catch_up(self, reply: Attached, position: Position) -> bool:
        """Reads what a resumed client has already. False: the log has not grown to it yet."""
        if any(n < count for n, count in zip(reply.n, position.counts, strict=True)):
            if reply.state == RequestState.FINISHED:
                raise self._diverged()
            if not reply.final:
                self._look_at_s = self._clock() + RETRY_S
                return False
        for cursor, count in zip(self.cursors, position.counts, strict=True):
            for entry in self._store.read_log(self.rid, cursor.c, 0).entries:
                if cursor.held < count:
                    cursor.take(_head(entry, count))
        is_whole = all(c.held == n for c, n in zip(self.cursors, position.counts, strict=True))
        if is_whole and digest_of([c.hashes[-1] for c in self.cursors]) != position.digest:
            raise self._diverged()
        for cursor, has_ended in zip(self.cursors, position.ended, strict=True):
            if has_ended:
                cursor.fin = self._store.read_log(self.rid, cursor.c, cursor.held).fin or FinEntry(reply.state, "")
        self._resume = None
        return True

    # ------------------------------------------------------------------ private
    def _told(self, cursor: ChoiceCursor, new: TokenEntry | None) -> Sequence[Came]:
        return [TokensCame(cursor.c, new)] if new is not None else []

    def _end(self, cursor: ChoiceCursor, fin: FinEntry) -> Sequence[Came]:
        if cursor.has_ended:
            return []
        cursor.fin = fin
        return [ChoiceEnded(cursor.c, fin)]

    def _diverged(self) -> StreamFailed:
        message = f"request {self.rid} goes on with another text than the one sent so far; send it again"
        return StreamFailed(502, "stream_diverged", message)


def _head(entry: TokenEntry, end: int) -> TokenEntry:
    """The part of `entry` before position `end`."""
    k = max(0, end - entry.index)
    return TokenEntry(entry.index, entry.prefix_hash, entry.token_ids[:k], entry.texts[:k], None, entry.prompt_logprobs)


def _ids_of(entries: Sequence[TokenEntry]) -> list[int]:
    ids: list[int] = []
    for entry in entries:
        ids[entry.index :] = entry.token_ids
    return ids
