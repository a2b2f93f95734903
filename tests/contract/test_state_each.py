"""Claims and hand-offs of several requests in one round trip: each is answered as if it had been called alone."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from kvstore.errors import BadRecord, StateError, StateUnavailable
from kvstore.state import (
    Busy,
    Claimed,
    ClaimItem,
    EmbeddedValkey,
    Final,
    Gone,
    HandedOff,
    HandoffItem,
    RequestState,
    SpansItem,
    Stale,
    StateStore,
)
from kvstore.state.keys import record_key
from kvstore.state.phases import PrefillSpans
from tests.conftest import ClockedStore
from tests.contract.state_requests import Owned, accepted, item, make_request, prefilling, state_of


def handed_to(owned: Owned, token: str) -> HandoffItem:
    return HandoffItem(owned.rid, owned.epoch, owned.token, token)


def test_every_request_of_a_burst_is_handed_over_under_its_own_token(state_store: StateStore) -> None:
    burst = [prefilling(state_store, token=f"w-1.{i}") for i in range(32)]
    state_store.append_batch([item(burst[5], [7])])

    replies = state_store.handoff_each([handed_to(owned, f"d-1.{i}") for i, owned in enumerate(burst)])

    assert replies == [HandedOff(3, [1 if i == 5 else 0], [False]) for i in range(32)]
    appended = state_store.append_batch(
        [item(Owned(o.rid, 3, f"d-1.{i}", "DECODING"), [9], before=[7] * (i == 5)) for i, o in enumerate(burst)]
    )
    assert {type(reply).__name__ for reply in appended} == {"Ok"}


def test_each_answer_is_the_one_that_a_call_alone_would_have_got(state_store: StateStore) -> None:
    good, cancelled, taken = (prefilling(state_store, token=f"w-1.{i}") for i in range(3))
    state_store.cancel(cancelled.rid, "by the client")
    state_store.handoff(taken.rid, taken.epoch, taken.token, "d-9.1")
    items = [
        handed_to(taken, "d-1.1"),
        handed_to(cancelled, "d-1.2"),
        HandoffItem("never-s00", 2, "w-1.1", "d-1.3"),
        handed_to(good, "d-1.4"),
    ]

    assert state_store.handoff_each(items) == [
        Stale(3, RequestState.DECODING),
        Final(RequestState.CANCELLED, "by the client"),
        Gone(),
        HandedOff(3, [0], [False]),
    ]


def test_a_burst_that_is_repeated_is_the_same_burst(state_store: StateStore) -> None:
    burst = [handed_to(prefilling(state_store, token=f"w-1.{i}"), f"d-1.{i}") for i in range(4)]
    first = state_store.handoff_each(burst[:2])  # the reply was lost, and two more came meanwhile

    again = state_store.handoff_each(burst)

    assert again[:2] == first
    assert again == [HandedOff(3, [0], [False])] * 4


def test_of_two_receivers_in_one_burst_the_first_wins(state_store: StateStore) -> None:
    owned = prefilling(state_store)

    replies = state_store.handoff_each([handed_to(owned, "d-1.1"), handed_to(owned, "d-2.1")])

    assert replies == [HandedOff(3, [0], [False]), Stale(3, RequestState.DECODING)]


def test_a_record_that_nobody_can_read_stands_in_its_place_as_an_error(clocked: ClockedStore) -> None:
    store = clocked.store
    first, bad, last = (prefilling(store, token=f"w-1.{i}") for i in range(3))
    clocked.raw.hset(record_key(bad.rid), "epoch", "many")

    replies = store.handoff_each([handed_to(owned, f"d-{owned.token}") for owned in (first, bad, last)])

    assert [type(reply) for reply in replies] == [HandedOff, BadRecord, HandedOff]
    assert isinstance(replies[1], BadRecord)
    assert replies[1].rid == bad.rid


def test_a_call_that_the_server_refuses_harms_no_other(clocked: ClockedStore) -> None:
    store = clocked.store
    first, second = prefilling(store, token="w-1.1"), prefilling(store, token="w-1.2")
    no_number = HandoffItem(first.rid, "x", first.token, "d-1.1")  # type: ignore[arg-type]

    replies = store.handoff_each([no_number, handed_to(second, "d-1.2")])

    assert type(replies[0]) is StateError
    assert "refused by the state server" in str(replies[0])
    assert replies[1] == HandedOff(3, [0], [False])


def test_requests_of_several_shards_go_in_one_burst(redis_url: str, clocked: ClockedStore) -> None:
    del clocked  # an empty server
    store = StateStore(redis_url, num_shards=3)
    rids = [f"multi{i}-s{i:02}" for i in range(3)]
    for rid in rids:
        assert store.accept(make_request(rid)).status == "OK"

    claims = store.claim_each([ClaimItem(rid, f"w-1.{i}") for i, rid in enumerate(rids)])
    handed = store.handoff_each([HandoffItem(rid, 2, f"w-1.{i}", f"d-1.{i}") for i, rid in enumerate(rids)])

    assert [reply.body.rid for reply in claims if isinstance(reply, Claimed)] == rids
    assert handed == [HandedOff(3, [0], [False])] * 3
    store.close()


def test_claims_of_a_burst_bring_each_its_own_body_or_say_why_not(state_store: StateStore) -> None:
    free, owned = accepted(state_store, k=2), prefilling(state_store)
    items = [ClaimItem(owned.rid, "w-2.1"), ClaimItem("never-s00", "w-2.2"), ClaimItem(free, "w-2.3")]

    busy, gone, won = state_store.claim_each(items)

    assert (busy, gone) == (Busy(RequestState.PREFILLING), Gone())
    assert isinstance(won, Claimed)
    assert (won.body.rid, won.n) == (free, [0, 0])
    again = state_store.claim_each(items)[2]
    assert isinstance(again, Claimed)
    assert (again.epoch, again.attempts) == (won.epoch, won.attempts), "a lost reply: the same claim"


def test_spans_of_several_requests_reach_their_records(state_store: StateStore) -> None:
    burst = [prefilling(state_store, token=f"w-1.{i}") for i in range(3)]
    spans = [PrefillSpans(owned.epoch, 10.0 + i, 1000.0) for i, owned in enumerate(burst)]

    replies = state_store.set_spans_each(
        [SpansItem("never-s00", spans[0]), *(SpansItem(o.rid, s) for o, s in zip(burst, spans, strict=True))]
    )

    assert replies == [None] * 4
    records = [state_store.record(owned.rid) for owned in burst]
    assert [record.prefill_spans for record in records if record] == spans


def test_no_request_is_no_call(state_store: StateStore) -> None:
    state_store.close()

    assert state_store.handoff_each([]) == state_store.claim_each([]) == []


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """One that a test may flush and stop."""
    server = EmbeddedValkey(tmp_path / "valkey", appendonly=False)
    server.start()
    yield server
    server.stop()


@pytest.mark.parametrize("num_items", [1, 3])
def test_functions_that_were_flushed_are_loaded_once_for_the_whole_burst(
    own_server: EmbeddedValkey, num_items: int
) -> None:
    store = StateStore(own_server.url)
    burst = [prefilling(store, token=f"w-1.{i}") for i in range(num_items)]
    raw = redis.Redis.from_url(own_server.url)
    raw.function_flush()

    replies = store.handoff_each([handed_to(owned, f"d-1.{i}") for i, owned in enumerate(burst)])

    assert replies == [HandedOff(3, [0], [False])] * num_items
    raw.close()
    store.close()


@pytest.mark.parametrize("num_items", [1, 3])
def test_a_server_that_takes_no_writes_answers_none_of_the_burst(own_server: EmbeddedValkey, num_items: int) -> None:
    store = StateStore(own_server.url)
    burst = [prefilling(store, token=f"w-1.{i}") for i in range(num_items)]
    items = [handed_to(owned, f"d-1.{i}") for i, owned in enumerate(burst)]
    raw = redis.Redis.from_url(own_server.url)
    raw.config_set("min-replicas-to-write", 1)

    with pytest.raises(StateUnavailable) as error:
        store.handoff_each(items)
    assert error.value.reason == "noreplicas"
    raw.config_set("min-replicas-to-write", 0)

    assert store.handoff_each(items) == [HandedOff(3, [0], [False])] * num_items
    raw.close()
    store.close()


class CutReplies:
    """A way to the server that passes whole calls on, and closes after `num_bytes` of the first replies."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.num_bytes = 1 << 30
        self.num_cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            while readable := select.select([client, server], [], [], 10)[0]:
                source = readable[0]
                chunk = source.recv(1 << 16)
                if not chunk:
                    return
                if source is client:
                    server.sendall(chunk)
                    continue
                client.sendall(chunk[: self.num_bytes])
                if len(chunk) > self.num_bytes:
                    self.num_cuts += 1
                    return


def test_replies_that_are_cut_in_the_middle_of_a_burst_are_no_replies_and_the_repeat_hands_over_once(
    own_server: EmbeddedValkey,
) -> None:
    direct = StateStore(own_server.url)
    way = CutReplies(own_server.port)
    store = StateStore(way.url)
    burst = [prefilling(store, token=f"w-1.{i}") for i in range(3)]
    items = [handed_to(owned, f"d-1.{i}") for i, owned in enumerate(burst)]
    way.num_bytes = 40  # a reply has 21 bytes: one whole, one half

    with pytest.raises(StateUnavailable):
        store.handoff_each(items)
    assert way.num_cuts >= 1
    assert {state_of(direct, owned.rid) for owned in burst} == {RequestState.DECODING}, "it was executed"
    way.num_bytes = 1 << 30

    assert store.handoff_each(items) == [HandedOff(3, [0], [False])] * 3
    records = [direct.record(owned.rid) for owned in burst]
    assert [record.epoch for record in records if record] == [3, 3, 3]
    store.close()
    direct.close()
    way.close()
