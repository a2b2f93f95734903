"""What each function does and answers, on a real server."""

from __future__ import annotations

import msgspec

from kvstore.address import KVAddress
from kvstore.state import (
    AppendItem,
    At,
    Attached,
    Busy,
    Cancelled,
    Claimed,
    Dup,
    Final,
    FinEntry,
    Fork,
    Gap,
    Gone,
    HandedOff,
    Ok,
    Released,
    RequestState,
    Stale,
    StateStore,
    TokenEntry,
    Turn,
    WorkerBeat,
)
from kvstore.state.hashing import hash_of
from kvstore.state.keys import log_key, record_key
from kvstore.state.phases import DecodeSpans, PrefillSpans
from tests.conftest import ClockedStore
from tests.contract.state_requests import FIN, Owned, accepted, claimed, item, make_request, prefilling, state_of

NEVER_SEEN = "nobody-s00"


# ---------------------------------------------------------------- accept, attach
def test_accept_gives_a_wake_up_whose_number_follows_the_clock(clocked: ClockedStore) -> None:
    request = make_request()

    reply = clocked.store.accept(request)

    assert (reply.status, reply.state, reply.n) == ("OK", RequestState.QUEUED, [0])
    assert reply.turns == [Turn(request.rid, clocked.now_ms)]


def test_accept_repeated_finds_the_same_request_and_its_wake_up(state_store: StateStore) -> None:
    request = make_request()
    first = state_store.accept(request)

    again = state_store.accept(request)

    assert again.status == "EXISTS"
    assert again.turns == first.turns


def test_accept_of_another_body_under_the_same_id_is_a_conflict(state_store: StateStore) -> None:
    rid = accepted(state_store)

    assert state_store.accept(make_request(rid, body_hash="b2")).status == "CONFLICT"


def test_attach_moves_the_feed_to_the_last_gateway(state_store: StateStore) -> None:
    owned = prefilling(state_store)
    state_store.attach(owned.rid, "gw-2")

    state_store.append_batch([item(owned, [7])])

    assert [x.n for x in state_store.read_feed("gw-2", {}, 0)] == [1]
    assert state_store.read_feed("gw-1", {}, 0) == []


def test_attach_to_an_ended_request_still_tells_counts_and_reason(state_store: StateStore) -> None:
    owned = prefilling(state_store)
    state_store.append_batch([item(owned, [7, 8], fin=FinEntry("FINISHED", "length"))])

    assert state_store.attach(owned.rid, "gw-2") == Attached(RequestState.FINISHED, [2], [True], "length")


def test_whoever_asks_for_an_unknown_request_hears_gone(state_store: StateStore) -> None:
    assert state_store.attach(NEVER_SEEN, "gw-1") == Gone()
    assert state_store.claim(NEVER_SEEN, "w-1.1") == Gone()
    assert state_store.handoff(NEVER_SEEN, 2, "w-1.1", "w-2.1") == Gone()
    assert state_store.release(NEVER_SEEN, 2, "w-1.1") == Gone()
    assert state_store.finish(NEVER_SEEN, 2, "w-1.1", "x") == Gone()
    assert state_store.cancel(NEVER_SEEN, "x") == Gone()
    assert state_store.append_batch([item(Owned(NEVER_SEEN, 2, "w-1.1", "DECODING"), [7])]) == [Gone()]
    assert state_store.record(NEVER_SEEN) is None


# ---------------------------------------------------------------- claim, handoff, release
def test_claim_brings_all_that_the_worker_needs(clocked: ClockedStore) -> None:
    request = make_request(k=2)
    clocked.store.accept(request)

    reply = claimed(clocked.store, request.rid, "w-1.1")

    assert (reply.epoch, reply.n, reply.fin, reply.attempts, reply.crash_attempts) == (2, [0, 0], [False, False], 1, 0)
    assert reply.body.prompt_ids == request.prompt_ids
    assert (reply.body.seed, reply.body.params, reply.body.meta) == (request.seed, request.params, request.meta)
    assert reply.remaining_s == request.deadline_in_s


def test_claim_repeated_with_the_same_token_is_the_same_claim(state_store: StateStore) -> None:
    rid = accepted(state_store)
    first = claimed(state_store, rid, "w-1.1")

    again = claimed(state_store, rid, "w-1.1")

    assert (again.epoch, again.attempts) == (first.epoch, first.attempts)


def test_second_claimer_is_told_busy_but_a_hedge_may_join(state_store: StateStore) -> None:
    owned = prefilling(state_store)

    assert state_store.claim(owned.rid, "w-2.1") == Busy(RequestState.PREFILLING)
    hedge = state_store.claim(owned.rid, "w-2.2", hedge=True, replicas=2)
    assert isinstance(hedge, Claimed)
    assert hedge.epoch == owned.epoch
    assert state_store.claim(owned.rid, "w-3.1", hedge=True, replicas=2) == Busy(RequestState.PREFILLING)


def test_first_of_two_hedged_replicas_to_hand_off_wins(state_store: StateStore) -> None:
    owned = prefilling(state_store)
    state_store.claim(owned.rid, "w-2.1", hedge=True, replicas=2)

    won = state_store.handoff(owned.rid, owned.epoch, "w-2.1", "d-1.1")

    assert isinstance(won, HandedOff)
    assert state_store.handoff(owned.rid, owned.epoch, owned.token, "d-2.1") == Stale(won.epoch, RequestState.DECODING)


def test_handoff_repeated_is_the_same_handoff(state_store: StateStore) -> None:
    owned = prefilling(state_store)
    first = state_store.handoff(owned.rid, owned.epoch, owned.token, "d-1.1")

    assert state_store.handoff(owned.rid, owned.epoch, owned.token, "d-1.1") == first == HandedOff(3, [0], [False])


def test_release_keeps_the_tokens_and_counts_no_crash(state_store: StateStore) -> None:
    owned = prefilling(state_store)
    state_store.append_batch([item(owned, [7])])

    released = state_store.release(owned.rid, owned.epoch, owned.token)
    again = claimed(state_store, owned.rid, "w-2.1")

    assert isinstance(released, Released)
    assert released.state is RequestState.QUEUED
    assert [turn.rid for turn in released.turns] == [owned.rid]
    assert (again.n, again.crash_attempts, again.attempts) == ([1], 0, 2)
    assert state_store.read_ids(owned.rid, 1) == [[7]]
    assert isinstance(state_store.release(owned.rid, owned.epoch, owned.token), Stale), "a repeat hears that it is done"


def test_release_of_one_replica_leaves_the_other_at_work(state_store: StateStore) -> None:
    owned = prefilling(state_store)
    state_store.claim(owned.rid, "w-2.1", hedge=True, replicas=2)

    assert state_store.release(owned.rid, owned.epoch, "w-2.1") == Released(RequestState.PREFILLING, [])
    assert state_store.append_batch([item(owned, [7])]) == [Ok()]


# ---------------------------------------------------------------- append_batch
def test_append_answers_each_item_for_itself(state_store: StateStore) -> None:
    good, ahead, behind, forked = (prefilling(state_store) for _ in range(4))
    state_store.append_batch([item(behind, [1, 2]), item(forked, [1, 2])])

    replies = state_store.append_batch(
        [
            item(good, [7]),
            item(ahead, [7], before=[5, 6]),
            item(behind, [2], before=[1]),
            item(forked, [7], before=[1, 3]),
            item(Owned(good.rid, 1, good.token, "PREFILLING"), [8], before=[7]),
        ]
    )

    assert replies == [Ok(), Gap(0), Dup(2), Fork(), Stale(good.epoch, RequestState.PREFILLING)]
    assert state_store.read_ids(good.rid, 1) == [[7]]
    assert state_store.read_ids(forked.rid, 1) == [[1, 2]]


def test_append_compares_hashes_that_no_double_can_hold(state_store: StateStore) -> None:
    owned = prefilling(state_store)
    true = item(owned, [9])
    state_store.append_batch([true])
    assert true.new_hash > 2**53
    behind = AppendItem(owned.rid, owned.epoch, owned.token, owned.state, 0, 1, true.new_hash ^ 1, 5, 1, b"\x00")

    assert state_store.append_batch([behind]) == [Fork()]


def test_append_repeated_without_a_reply_writes_nothing_twice(state_store: StateStore) -> None:
    owned = prefilling(state_store)
    state_store.append_batch([item(owned, [7, 8])])

    assert state_store.append_batch([item(owned, [7, 8])]) == [Dup(2)]
    assert state_store.read_ids(owned.rid, 1) == [[7, 8]]


def test_request_ends_with_the_fin_of_its_last_open_choice(state_store: StateStore) -> None:
    owned = prefilling(state_store, k=3)

    for c in (1, 0):
        state_store.append_batch([item(owned, [7], c=c, fin=FIN)])
        assert state_of(state_store, owned.rid) is RequestState.PREFILLING
    state_store.append_batch([item(owned, [], c=2, fin=FinEntry("FINISHED", "length", text="."))])

    assert state_of(state_store, owned.rid) is RequestState.FINISHED
    assert [state_store.read_log(owned.rid, c, 0).fin for c in (0, 1, 2)] == [
        FIN,
        FIN,
        FinEntry("FINISHED", "length", text="."),
    ]


def test_a_choice_that_has_ended_takes_no_more_tokens(state_store: StateStore) -> None:
    owned = prefilling(state_store, k=2)
    state_store.append_batch([item(owned, [7], fin=FIN)])

    assert state_store.append_batch([item(owned, [8], before=[7]), item(owned, [7], fin=FIN)]) == [Ok(), Ok()]
    assert state_store.read_ids(owned.rid, 2) == [[7], []]


def test_all_items_of_a_call_come_as_one_packed_feed_entry(state_store: StateStore) -> None:
    many = [prefilling(state_store) for _ in range(40)]

    state_store.append_batch([item(owned, [7, 300], fin=FIN if owned is many[3] else None) for owned in many])
    cursors: dict[int, str] = {}
    hints = state_store.read_feed("gw-1", cursors, 0)

    assert [(x.rid, x.c, x.n, x.prefix_hash) for x in hints] == [(owned.rid, 0, 2, 0) for owned in many]
    assert msgspec.msgpack.decode(hints[0].tokens, type=TokenEntry).token_ids == (7, 300)
    assert msgspec.msgpack.decode(hints[3].fin, type=FinEntry) == FIN
    assert state_store.read_feed("gw-1", cursors, 0) == []


def test_a_long_entry_keeps_its_length_in_the_feed(state_store: StateStore) -> None:
    owned = prefilling(state_store)
    ids = list(range(1000, 31_000))

    state_store.append_batch([item(owned, ids)])

    (hint,) = state_store.read_feed("gw-1", {}, 0)
    assert len(hint.tokens) > 65_536
    assert msgspec.msgpack.decode(hint.tokens, type=TokenEntry).token_ids == tuple(ids)


def test_reader_gets_from_the_log_what_it_lacks(state_store: StateStore) -> None:
    owned = prefilling(state_store)
    state_store.append_batch([item(owned, [7, 8])])
    state_store.append_batch([item(owned, [9], before=[7, 8], fin=FIN)])

    assert [e.token_ids for e in state_store.read_log(owned.rid, 0, 0).entries] == [(7, 8), (9,)]
    assert [e.token_ids for e in state_store.read_log(owned.rid, 0, 1).entries] == [(7, 8), (9,)]
    assert [e.token_ids for e in state_store.read_log(owned.rid, 0, 2).entries] == [(9,)]
    assert state_store.read_log(owned.rid, 0, 3).entries == []
    assert state_store.read_log(owned.rid, 0, 3).fin == FIN, "who holds all tokens still gets the end"


# ---------------------------------------------------------------- ends, refill, adoption, display
def test_cancel_ends_each_open_choice_and_tells_its_gateway(state_store: StateStore) -> None:
    owned = prefilling(state_store, k=2)
    state_store.append_batch([item(owned, [7], fin=FIN)])
    cursors: dict[int, str] = {}
    state_store.read_feed("gw-1", cursors, 0)

    reply = state_store.cancel(owned.rid, "client_disconnected")

    assert isinstance(reply, Cancelled)
    assert (reply.state_before, reply.owners) == (RequestState.PREFILLING, [owned.token])
    assert state_store.read_log(owned.rid, 0, 0).fin == FIN
    assert state_store.read_log(owned.rid, 1, 0).fin == FinEntry("CANCELLED", "client_disconnected")
    assert [(x.c, x.n) for x in state_store.read_feed("gw-1", cursors, 0)] == [(1, 0)]
    assert state_store.cancel(owned.rid, "again") == Final(RequestState.CANCELLED, "client_disconnected")


def test_ended_request_is_kept_for_five_minutes(clocked: ClockedStore) -> None:
    owned = prefilling(clocked.store)
    clocked.store.append_batch([item(owned, [7], fin=FIN)])

    for key in (record_key(owned.rid), log_key(owned.rid, 0)):
        assert 290 <= clocked.raw.ttl(key) <= 300
    assert clocked.raw.zcard("cel:{s00}:live") == 0


def test_refill_goes_behind_the_log_and_nowhere_else(state_store: StateStore) -> None:
    owned = prefilling(state_store)
    state_store.append_batch([item(owned, [7])])
    back = TokenEntry(1, hash_of([7]), (8, 9), ("a", "b"))

    assert state_store.refill(owned.rid, 0, back, new_hash=hash_of([7, 8, 9])) == Ok()
    assert state_store.refill(owned.rid, 0, back, new_hash=hash_of([7, 8, 9])) == At(3)
    other = TokenEntry(3, hash_of([7, 8, 8]), (9,), ("c",))
    assert state_store.refill(owned.rid, 0, other, new_hash=1) == At(3)
    assert state_store.read_ids(owned.rid, 1) == [[7, 8, 9]]


def test_newer_epoch_than_the_record_is_adopted(state_store: StateStore) -> None:
    """A failover lost the handoff: the decode worker's next append proves it, and goes on."""
    owned = prefilling(state_store)
    newer = Owned(owned.rid, owned.epoch + 3, "d-1.1", "DECODING")

    assert state_store.append_batch([item(newer, [7])]) == [Ok()]
    assert state_store.append_batch([item(owned, [8], before=[7])]) == [Stale(newer.epoch, RequestState.DECODING)]
    record = state_store.record(owned.rid)
    assert record is not None
    assert (record.state, record.epoch, set(record.owners)) == (RequestState.DECODING, newer.epoch, {"d-1.1"})


def test_stamps_tell_when_each_part_of_the_life_began(clocked: ClockedStore) -> None:
    begin = clocked.now_ms
    owned = prefilling(clocked.store)
    clocked.advance(1.0)
    clocked.store.set_phase(owned.rid, "transferring")
    clocked.store.append_batch([item(owned, [7])])
    clocked.advance(1.0)
    clocked.store.handoff(owned.rid, owned.epoch, owned.token, "d-1.1")

    record = clocked.store.record(owned.rid)
    assert record is not None
    assert {name: at - begin for name, at in record.stamps.items()} == {
        "queued": 0,
        "claimed": 0,
        "first_token": 1000,
        "handed": 2000,
    }
    assert record.phase == "decoding"


def test_spans_that_workers_measured_are_kept_also_after_the_end(state_store: StateStore) -> None:
    prefill = PrefillSpans(epoch=2, prefill_ms=20.5, computed_ms=1035.0, reserve_ms=5.0)
    decode = DecodeSpans(epoch=3, decode_wait_ms=4.0, first_step_ms=6.0, verified_ms=1038.0, stepped_ms=1048.0)
    owned = prefilling(state_store)
    state_store.set_spans(owned.rid, prefill)
    state_store.finish(owned.rid, owned.epoch, owned.token, "internal_error")
    state_store.set_spans(owned.rid, decode)
    state_store.set_spans("nobody-s00", decode)

    record = state_store.record(owned.rid)
    assert record is not None
    assert (record.state, record.phase) == (RequestState.FAILED, "failed")
    assert (record.prefill_spans, record.decode_spans) == (prefill, decode)
    assert state_store.record("nobody-s00") is None


def test_stamps_are_on_the_clock_that_the_server_tells_to_the_microsecond(state_store: StateStore) -> None:
    before_ms = state_store.server_time_ms()
    rids = [accepted(state_store) for _ in range(8)]
    claim = claimed(state_store, rids[-1], "p-1.1")
    after_ms = state_store.server_time_ms()

    records = [record for rid in rids if (record := state_store.record(rid)) is not None]
    stamps = [record.stamps["queued"] for record in records]
    # A call of the library sees the time of its start, cached; the command TIME the time of its answer.
    assert [before_ms, *stamps, claim.claimed_ms, after_ms] == sorted([before_ms, *stamps, claim.claimed_ms, after_ms])
    assert len({round(stamp * 1000) % 1000 for stamp in stamps}) > 1, "whole milliseconds"


def test_requests_are_counted_by_state(state_store: StateStore) -> None:
    accepted(state_store)
    owned = prefilling(state_store)
    prefilling(state_store)
    state_store.handoff(owned.rid, owned.epoch, owned.token, "d-1.1")

    assert state_store.count_by_state() == {"QUEUED": 1, "PREFILLING": 1, "DECODING": 1}


def test_worker_is_registered_for_one_lease_after_each_beat(clocked: ClockedStore) -> None:
    beat = WorkerBeat(
        incarnation="w-1", node="d0@h", role="decode", model="m", address=KVAddress(incarnation="w-1", host_id="h")
    )
    clocked.store.heartbeat(beat)

    assert clocked.store.workers() == [beat]
    clocked.advance(2.1)
    assert clocked.store.workers() == []
    clocked.store.heartbeat(beat)
    clocked.store.retire("w-1")
    assert clocked.store.workers() == []
