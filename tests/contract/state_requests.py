"""Requests for the contract tests of the state functions: made, and brought into a wanted state by the functions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import msgspec

from kvstore.state import (
    AppendItem,
    Claimed,
    FinEntry,
    HandedOff,
    NewRequest,
    RequestState,
    StateStore,
    TokenEntry,
)
from kvstore.state.hashing import hash_of
from tests.conftest import ClockedStore

DEADLINE_S = 100.0
_ids = count(1)
encode = msgspec.msgpack.encode


def make_request(rid: str = "", *, k: int = 1, deadline_in_s: float = DEADLINE_S, body_hash: str = "b1") -> NewRequest:
    return NewRequest(
        rid=rid or f"req{next(_ids)}-s00",
        model="tiny-chat",
        tenant="t1",
        priority=0,
        deadline_in_s=deadline_in_s,
        seed=2**63 - 1,
        k=k,
        params=b"\x80",
        prompt_ids=[1, 2, 3],
        gateway="gw-1",
        body_hash=body_hash,
        meta=b"m",
    )


def accepted(store: StateStore, *, k: int = 1, deadline_in_s: float = DEADLINE_S) -> str:
    request = make_request(k=k, deadline_in_s=deadline_in_s)
    assert store.accept(request).status == "OK"
    return request.rid


def claimed(store: StateStore, rid: str, token: str) -> Claimed:
    reply = store.claim(rid, token)
    assert isinstance(reply, Claimed)
    return reply


@dataclass(frozen=True)
class Owned:
    """A request and what its owner knows. In a state without an owner: what its last owner knew."""

    rid: str
    epoch: int
    token: str
    state: str


def prefilling(store: StateStore, *, k: int = 1, token: str = "w-1.1") -> Owned:
    """A new request, claimed by `token`."""
    rid = accepted(store, k=k)
    return Owned(rid, claimed(store, rid, token).epoch, token, "PREFILLING")


def item(
    owned: Owned, ids: list[int], *, before: list[int] | None = None, c: int = 0, fin: FinEntry | None = None
) -> AppendItem:
    """`ids` behind `before` (the ids that the owner believes are in the log)."""
    before = before or []
    prefix_hash, texts = hash_of(before), tuple(f"<{i}>" for i in ids)
    return AppendItem(
        owned.rid,
        owned.epoch,
        owned.token,
        owned.state,
        c,
        len(before),
        prefix_hash,
        hash_of(ids, start=prefix_hash),
        len(ids),
        encode(TokenEntry(len(before), prefix_hash, tuple(ids), texts)) if ids else b"",
        encode(fin) if fin else None,
    )


FIN = FinEntry("FINISHED", "stop")


def in_state(clocked: ClockedStore, state: RequestState) -> Owned:
    """A request of one choice in `state`, brought there by the functions alone."""
    store = clocked.store
    rid = accepted(store)
    if state is RequestState.QUEUED:
        return Owned(rid, 1, "w-1.1", "PREFILLING")
    epoch = claimed(store, rid, "w-1.1").epoch
    owned = Owned(rid, epoch, "w-1.1", "PREFILLING")
    match state:
        case RequestState.DECODING:
            reply = store.handoff(rid, epoch, "w-1.1", "w-2.1")
            assert isinstance(reply, HandedOff)
            owned = Owned(rid, reply.epoch, "w-2.1", "DECODING")
        case RequestState.FINISHED:
            store.append_batch([item(owned, [7], fin=FIN)])
        case RequestState.FAILED:
            store.finish(rid, epoch, "w-1.1", "engine_error")
        case RequestState.CANCELLED:
            store.cancel(rid, "user")
        case RequestState.EXPIRED:
            clocked.advance(DEADLINE_S)
            store.attach(rid, "gw-1")
    assert state_of(store, rid) is state
    return owned


def state_of(store: StateStore, rid: str) -> RequestState:
    record = store.record(rid)
    assert record is not None
    return record.state
