"""All request state, behind one object: records, logs, feeds, leases, wake-ups, the registry of workers.

The functions in `lua/` do the work inside the server; this class names their arguments and gives typed replies. Each
method is one round trip unless it says otherwise. Every one may raise StateUnavailable: then it is unknown whether it
ran, and the caller repeats it with the same arguments. BadRecord means that this one request's record is unreadable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import msgspec

from kvstore.errors import BadRecord, StateError, StateUnavailable
from kvstore.state import library, parsing, streams
from kvstore.state.connection import Connection
from kvstore.state.entries import FeedItem, TokenEntry
from kvstore.state.handles import PrefixHandle
from kvstore.state.handles import find as find_handle
from kvstore.state.handles import put as put_handles
from kvstore.state.keys import REGISTRY_KEY, checked_name, live_key, new_request_id, record_key, shard_of
from kvstore.state.parsing import code_of, common, no_stale, turns_of
from kvstore.state.phases import NAMES, Spans, encode_spans
from kvstore.state.records import (
    AppendItem,
    ClaimItem,
    HandoffItem,
    NewRequest,
    Record,
    RenewItem,
    SpansItem,
    WorkerBeat,
    accept_arguments,
    record_from,
)
from kvstore.state.replies import (
    Accepted,
    AppendReply,
    At,
    Attached,
    Busy,
    Cancelled,
    Claimed,
    Evicted,
    Gone,
    HandedOff,
    Log,
    Ok,
    Reaped,
    Released,
    Stale,
)
from kvstore.state.replies import Final as Ended
from kvstore.state.transitions import RequestState

REPEATS_PER_S: Final = 50  # wake-ups that all reapers together may repeat
Word = str | bytes | int
_T = TypeVar("_T")
EVIDENCE: Final = frozenset({"exited", "engine"})
_encode = msgspec.msgpack.Encoder().encode
_decode_beat = msgspec.msgpack.Decoder(WorkerBeat).decode


class StateStore:
    """All calls on one state server. Thread-safe (a pool of connections)."""

    def __init__(
        self, url: str, *, num_shards: int = 1, timeout_s: float = 1.0, functions: library.Library | None = None
    ) -> None:
        self.num_shards = num_shards
        self._connection = Connection(url, library=functions or library.production(), timeout_s=timeout_s)

    # ------------------------------------------------------------------ the server
    def load_library(self) -> None:
        """Loads the functions where they are missing or older. Any call does so by itself on "Function not found"."""
        self._connection.load_library()

    def ping(self) -> float:
        """Round trip, seconds."""
        return self._connection.ping()

    def close(self) -> None:
        self._connection.close()

    def new_request_id(self) -> str:
        return new_request_id(self.num_shards)

    # ------------------------------------------------------------------ gateway
    def accept(self, request: NewRequest) -> Accepted:
        """Writes the record. OK or EXISTS: send the turns, then `attach`; CONFLICT: another body under this id."""
        checked_name(request.gateway)
        reply = self._call("accept", request.rid, *accept_arguments(request)[1:])
        if code_of(reply) == "BADREC":
            common(request.rid, reply)
        return Accepted(code_of(reply), parsing.state_of(reply[1]), parsing.counts_of(reply[2]), turns_of(reply[3]))

    def attach(self, rid: str, gateway: str) -> Attached | Gone:
        """Makes `gateway` the target of the feed (the last one wins). Gone while a client waits: accept again."""
        reply = self._call("attach", rid, checked_name(gateway))
        if code_of(reply) != "OK":
            return parsing.only_gone(rid, reply)
        return Attached(
            parsing.state_of(reply[1]), parsing.counts_of(reply[2]), parsing.flags_of(reply[3]), reply[4].decode()
        )

    def cancel(self, rid: str, reason: str) -> Cancelled | Ended | Gone:
        """Ends it, whoever owns it. Called again after 1, 2 and 4 s: a failover may have lost the end."""
        reply = self._call("cancel", rid, reason)
        if code_of(reply) != "OK":
            return no_stale(rid, common(rid, reply))
        owners = [token.decode() for token in reply[3]]
        return Cancelled(parsing.state_of(reply[1]), int(reply[2]), owners, turns_of(reply[4]))

    def refill(self, rid: str, c: int, entry: TokenEntry, *, new_hash: int) -> Ok | At | Ended | Gone:
        """Puts back tokens that a client has and the server lost. `new_hash`: over the ids up to the entry's end."""
        head = streams.feed_head(rid, c, entry.end, entry.prefix_hash)
        reply = self._call(
            "refill", rid, c, entry.index, entry.prefix_hash, new_hash, len(entry.token_ids), _encode(entry), head
        )
        return parsing.refill_reply(rid, reply)

    def read_log(self, rid: str, c: int, after_n: int) -> Log:
        """What a reader that holds `after_n` tokens lacks; the first entry may begin before `after_n`."""
        return streams.read_log(self._connection, rid, c, after_n)

    def read_ids(self, rid: str, k: int) -> list[list[int]]:
        """The output ids so far of each of `k` choices."""
        return streams.read_ids(self._connection, rid, k)

    def read_feed(self, gateway: str, cursors: dict[int, str], block_ms: int) -> list[FeedItem]:
        """New hints of all shards; waits `block_ms` (at most 2 s; 0: not at all). Moves `cursors`, empty at first."""
        for shard in range(self.num_shards):
            cursors.setdefault(shard, "0-0")
        return streams.read_feed(self._connection, gateway, cursors, block_ms)

    # ------------------------------------------------------------------ worker
    def claim(self, rid: str, token: str, *, hedge: bool = False, replicas: int = 1) -> Claimed | Busy | Ended | Gone:
        """Takes it for this token. Busy, Final, Gone: ack the Celery message and forget it."""
        return parsing.claim_reply(rid, self._call("claim", rid, checked_name(token), int(hedge), replicas))

    def claim_each(self, items: Sequence[ClaimItem]) -> list[Claimed | Busy | Ended | Gone | StateError]:
        """`claim` of several requests, in one round trip. One reply per item, in order.

        A StateError in an item's place, BadRecord too, is what `claim` would have raised: no other item is harmed.
        Raises StateUnavailable for all of them: repeat all with the same tokens, also those that may have been claimed.
        """
        words = [(x.rid, checked_name(x.token), 0, 1) for x in items]
        return self._call_each("claim", words, parsing.claim_reply)

    def append_batch(self, items: Sequence[AppendItem]) -> list[AppendReply]:
        """Writes the tokens of one step: a call per shard, in one pipeline. One reply per item, in order.

        Stale, Final, Gone: stop the sequence. Fork: release it. Gap, Dup: move the cursor. No reply at all: keep the
        cursors, the same items go with the next step.
        """
        replies: list[AppendReply] = [Ok()] * len(items)
        shards = self._by_shard([item.rid for item in items])
        calls = [(live_key(s), _flat([_append_words(items[i]) for i in places])) for s, places in shards.items()]
        answers = self._connection.call_each("append_batch", calls) if calls else []
        for places, answer in zip(shards.values(), answers, strict=True):
            for position, reply in answer:
                i = places[int(position)]
                replies[i] = parsing.item_reply(items[i].rid, reply)
        return replies

    def renew(self, items: Sequence[RenewItem]) -> list[tuple[RenewItem, Stale | Ended | Gone]]:
        """Every lease anew, also one that is over if nobody took over. Only those that are lost come back."""
        lost: list[tuple[RenewItem, Stale | Ended | Gone]] = []
        shards = self._by_shard([item.rid for item in items])
        calls = [
            (live_key(s), _flat([(x.rid, x.epoch, x.token, x.state) for x in (items[i] for i in places)]))
            for s, places in shards.items()
        ]
        answers = self._connection.call_each("renew", calls) if calls else []
        for places, answer in zip(shards.values(), answers, strict=True):
            for position, reply in answer:
                item = items[places[int(position)]]
                verdict = parsing.item_reply(item.rid, reply)
                if not isinstance(verdict, Stale | Ended | Gone):
                    raise StateError(f"renew answered {verdict} for {item.rid}: the library is not ours")
                lost.append((item, verdict))
        return lost

    def handoff(self, rid: str, epoch: int, from_token: str, to_token: str) -> HandedOff | Stale | Ended | Gone:
        """Called by the receiver of verified KV, or by a worker to itself. Not handed: free the blocks, say REFUSED."""
        return parsing.handoff_reply(rid, self._call("handoff", rid, epoch, from_token, checked_name(to_token)))

    def handoff_each(self, items: Sequence[HandoffItem]) -> list[HandedOff | Stale | Ended | Gone | StateError]:
        """`handoff` of several requests, in one round trip. Replies and errors as those of `claim_each`."""
        words = [(x.rid, x.epoch, x.from_token, checked_name(x.to_token)) for x in items]
        return self._call_each("handoff", words, parsing.handoff_reply)

    def release(self, rid: str, epoch: int, token: str) -> Released | Stale | Ended | Gone:
        """Gives it back, its tokens kept, no crash counted. Stale: it had been done."""
        reply = self._call("release", rid, epoch, token)
        if code_of(reply) != "OK":
            return common(rid, reply)
        return Released(parsing.state_of(reply[1]), turns_of(reply[2]))

    def finish(self, rid: str, epoch: int, token: str, reason: str) -> Ok | Ended | Stale | Gone:
        """FAILED, with an error code as reason. FINISHED comes only with the last token's `fin`."""
        reply = self._call("finish", rid, epoch, token, reason)
        return Ok() if code_of(reply) == "OK" else common(rid, reply)

    def set_phase(self, rid: str, phase: str) -> None:
        """For display only. No record, or a final one: nothing happens."""
        self._call("phase", rid, phase)

    def set_spans(self, rid: str, spans: Spans) -> None:
        """What this worker measured of the request's phases; also of one that has ended. No record: nothing happens."""
        self._call("phase", rid, *_span_words(spans))

    def set_spans_each(self, items: Sequence[SpansItem]) -> list[StateError | None]:
        """`set_spans` of several requests, in one round trip. Errors as those of `claim_each`."""
        return self._call_each("phase", [(x.rid, *_span_words(x.spans)) for x in items], lambda *_: None)

    def server_time_ms(self) -> float:
        """The clock that all stamps of records are on, to the microsecond."""
        seconds, microseconds = self._connection.command("TIME")
        return int(seconds) * 1000 + int(microseconds) / 1000

    # ------------------------------------------------------------------ reaper, supervisor
    def reap(self, shard: int, *, idle: bool) -> Reaped:
        """Takeover, expiry and lost wake-ups of one shard; every 0.5 s by each gateway, jittered.

        `idle`: at each look of the last second the broker's queue was empty and a live worker had a hand free.
        """
        reply = self._connection.call("reap", live_key(shard), int(idle), REPEATS_PER_S / self.num_shards)
        return Reaped(turns_of(reply[0]), turns_of(reply[1]))

    def evict(self, incarnation: str, evidence: str) -> Evicted:
        """Ends the leases of an incarnation whose end is PROVEN, on all shards: one call each, in one pipeline.

        `evidence`: "exited" (waitpid or pidfd of a process on this host) or "engine" (a front reports its own). Never
        call it on a timeout, a missed heartbeat or a refused connection: those wait for the lease.
        """
        if evidence not in EVIDENCE:
            raise ValueError(f"evidence {evidence!r} proves nothing; expected one of {sorted(EVIDENCE)}")
        words = (checked_name(incarnation), evidence)
        replies = self._connection.call_each("evict", [(live_key(s), words) for s in range(self.num_shards)])
        turns = [turn for reply in replies for turn in turns_of(reply[0])]
        return Evicted(turns, sum(int(reply[1]) for reply in replies))

    # ------------------------------------------------------------------ registry
    def heartbeat(self, beat: WorkerBeat) -> None:
        """Registers the worker for 2 s. Routing only."""
        self._connection.call("heartbeat", REGISTRY_KEY, checked_name(beat.incarnation), _encode(beat))

    def workers(self) -> list[WorkerBeat]:
        """Workers whose registry lease runs. A beat of another version is left out."""
        beats: list[WorkerBeat] = []
        for packed in self._connection.call("workers", REGISTRY_KEY):
            try:
                beats.append(_decode_beat(packed))
            except msgspec.DecodeError:
                continue  # a worker of another version: nothing could be routed to it
        return beats

    def retire(self, incarnation: str) -> None:
        """Leaves the registry at once: an ordered exit."""
        self._connection.call("retire", REGISTRY_KEY, incarnation)

    # ------------------------------------------------------------------ prefixes
    def put_handles(self, handles: Sequence[PrefixHandle], secret: bytes) -> None:
        """Files who keeps which prefix, signed, for some minutes."""
        put_handles(self._connection, handles, secret)

    def find_handle(self, names: Sequence[str], secrets: Sequence[bytes], now_s: float) -> PrefixHandle | None:
        """The first of `names` that somebody keeps. A hint; `now_s` is Unix time."""
        return find_handle(self._connection, names, secrets, now_s)

    # ------------------------------------------------------------------ display
    def record(self, rid: str) -> Record | None:
        """The record, or None if there is none (any more)."""
        try:
            fields = self._connection.command("HGETALL", record_key(rid))
        except StateUnavailable:
            raise
        except StateError as error:
            raise BadRecord(rid=rid, why=str(error)) from error
        flat = [x for pair in fields.items() for x in pair] if isinstance(fields, dict) else fields
        return record_from(rid, flat) if flat else None

    def count_by_state(self) -> dict[str, int]:
        """Requests that are not final, by state. Some round trips: one per 500 requests."""
        counts = {state.value: 0 for state in (RequestState.QUEUED, RequestState.PREFILLING, RequestState.DECODING)}
        for shard in range(self.num_shards):
            rids = [rid.decode() for rid in self._connection.command("ZRANGE", live_key(shard), 0, -1)]
            for start in range(0, len(rids), 500):
                words = [("HGET", record_key(rid), "state") for rid in rids[start : start + 500]]
                for state in self._connection.pipeline(words):
                    if state is not None and state.decode() in counts:
                        counts[state.decode()] += 1
        return counts

    # ------------------------------------------------------------------ private
    def _call(self, function: str, rid: str, *arguments: Word) -> Any:
        return self._connection.call(function, live_key(shard_of(rid)), rid, *arguments)

    def _call_each(
        self, function: str, rows: Sequence[tuple[str, *tuple[Word, ...]]], parse: Callable[[str, Any], _T]
    ) -> list[_T | StateError]:
        """A call per row (request id, arguments), in one pipeline; what is wrong with one row stands in its place."""
        calls = [(live_key(shard_of(row[0])), row) for row in rows]
        answers = self._connection.call_apart(function, calls) if calls else []
        return [
            _parsed(parse, row[0], answer) if not isinstance(answer, StateError) else answer
            for row, answer in zip(rows, answers, strict=True)
        ]

    def _by_shard(self, rids: Sequence[str]) -> dict[int, list[int]]:
        places: dict[int, list[int]] = {}
        for i, rid in enumerate(rids):
            places.setdefault(shard_of(rid), []).append(i)
        return places


def _parsed(parse: Callable[[str, Any], _T], rid: str, reply: Any) -> _T | StateError:
    try:
        return parse(rid, reply)
    except StateError as error:
        return error


def _span_words(spans: Spans) -> tuple[Word, Word, Word]:
    return "", NAMES[type(spans)], encode_spans(spans)


def _append_words(item: AppendItem) -> Sequence[Word]:
    return (
        item.rid,
        item.epoch,
        item.token,
        item.state,
        item.c,
        item.index,
        item.prefix_hash,
        item.new_hash,
        item.count,
        item.tokens,
        item.fin or b"",
        streams.feed_head(item.rid, item.c, item.index + item.count, item.prefix_hash),
    )


def _flat(rows: Sequence[Sequence[Word]]) -> list[Word]:
    return [word for row in rows for word in row]
