"""One API call in work: its requests, followed together, as pieces with their positions.

Driven by the thread that serves the call; holds no socket and no JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvstore.clock import Clock
from kvstore.state.transitions import RequestState
from webapp.errors import ApiError, StreamFailed
from webapp.openai.pieces import Piece, PieceMaker
from webapp.streaming.follower import Came, Follower, TokensCame
from webapp.streaming.mailbox import FeedReader, Mailbox
from webapp.streaming.position import Position, digest_of, sign_position


class ClientGone(Exception):
    """The client closed its connection; nobody is left to tell."""


@dataclass(frozen=True)
class Told:
    """A piece for choice `index` of the call, and the client's position behind it ("" where none is kept)."""

    index: int
    piece: Piece
    position: str = ""


class Session:
    """Follows `followers` (one per prompt, `k` choices each) until all choices have ended.

    Args:
        first_index: index of the first choice of the first follower.
        secret: signs positions; only calls of one request have them.
        is_draining: True ends the stream with an error event.
    """

    def __init__(
        self,
        followers: list[Follower],
        *,
        reader: FeedReader,
        box: Mailbox,
        clock: Clock,
        secret: bytes,
        is_draining: Callable[[], bool],
        first_index: int = 0,
    ) -> None:
        self.followers = followers
        self.box = box
        self._k = len(followers[0].cursors)
        self._first_index = first_index
        self._by_rid = {follower.rid: i for i, follower in enumerate(followers)}
        self._makers = [[PieceMaker(c) for c in range(self._k)] for _ in followers]
        self._told_end = [[False] * self._k for _ in followers]
        self._reader = reader
        self._clock = clock
        self._secret = secret
        self._is_draining = is_draining
        for follower in followers:
            reader.subscribe(follower.rid, box)

    @property
    def rids(self) -> list[str]:
        return [follower.rid for follower in self.followers]

    @property
    def has_ended(self) -> bool:
        return all(follower.has_ended for follower in self.followers)

    def close(self) -> None:
        """No more hints are wanted. May be called twice."""
        for rid in self.rids:
            self._reader.unsubscribe(rid)

    def resume(self, position: Position) -> None:
        """Go on behind `position`; only for a session of one request."""
        self.followers[0].resume_at(position)
        for maker, count, ended in zip(self._makers[0], position.counts, position.ended, strict=True):
            maker.num_tokens, maker.is_started = count, count > 0
            self._told_end[0][maker.c] = ended

    def batches(self, *, tick_s: float) -> Iterator[list[Told]]:
        """What came, batch by batch; an empty one at least every `tick_s` seconds.

        Raises:
            ClientGone: the client closed its connection.
            StreamFailed: a request did not finish; what was told before stays true.
        """
        while not self.has_ended:
            if self.box.is_disconnected:
                raise ClientGone
            if self._is_draining():
                message = "this gateway is shutting down; the request goes on, resume it at another gateway"
                raise StreamFailed(503, "draining", message)
            due_s = min(f.look_in_s() for f in self.followers if not f.has_ended)
            items, has_lost = self.box.wait(min(due_s, tick_s))
            told: list[Told] = []
            try:
                for item in items:
                    i = self._by_rid[item.rid]
                    self._tell(i, self.followers[i].offer(item), told)
                for i, follower in enumerate(self.followers):
                    if not follower.has_ended and (has_lost or follower.look_in_s() <= 0):
                        self._tell(i, follower.look(), told)
            except ApiError:
                if told:
                    yield told
                raise
            yield told

    def _tell(self, i: int, came: list[Came], told: list[Told]) -> None:
        for event in came:
            maker = self._makers[i][event.c]
            if isinstance(event, TokensCame):
                pieces = maker.tokens(event.entry)
            elif event.fin.state != RequestState.FINISHED:
                raise failure_of(event.fin.state, event.fin.reason, self.followers[i].rid)
            else:
                pieces = maker.end(event.fin)
                self._told_end[i][event.c] = True
            for piece in pieces:
                # The end's own piece, or the text before it: a position stands behind the last of them only.
                position = self._position(i) if piece is pieces[-1] else ""
                told.append(Told(self._first_index + i * self._k + event.c, piece, position))

    def _position(self, i: int) -> str:
        if len(self.followers) > 1:
            return ""
        follower = self.followers[i]
        counts = tuple(maker.num_tokens for maker in self._makers[i])
        hashes = [cursor.hashes[n] for cursor, n in zip(follower.cursors, counts, strict=True)]
        position = Position(counts, tuple(self._told_end[i]), digest_of(hashes))
        return sign_position(follower.rid, position, self._secret)


def failure_of(state: str, reason: str, rid: str) -> StreamFailed:
    """The error that a client is told for a request that ended in `state`."""
    if state == RequestState.EXPIRED:
        message = f"request {rid} did not end before its deadline; allow more time or ask for fewer tokens"
        return StreamFailed(504, "deadline_exceeded", message)
    if state == RequestState.CANCELLED:
        return StreamFailed(499, "cancelled", f"request {rid} was cancelled")
    if reason == "constraint_failed":
        message = f"request {rid}: nothing can follow that its structured output allows; loosen it or the other fields"
        return StreamFailed(400, reason, message)
    if reason == "schema_too_complex":
        message = f"request {rid}: its structured output took a worker too long to compile; use a simpler one"
        return StreamFailed(400, reason, message)
    message = f"request {rid} failed ({reason or 'no reason given'}); its workers were lost or gave up, send it again"
    return StreamFailed(502, "upstream_failed", message)
