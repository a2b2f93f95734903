"""Leases, takeovers and repeated wake-ups on a real server, mostly on the functions' test clock."""

from __future__ import annotations

import pytest

from kvstore.state import (
    Final,
    RenewItem,
    RequestState,
    StateStore,
    Turn,
)
from tests.conftest import ClockedStore
from tests.contract.state_requests import accepted, claimed, item, make_request, prefilling, state_of


def test_renew_holds_a_lease_that_is_over_as_long_as_nobody_took_over(clocked: ClockedStore) -> None:
    owned = prefilling(clocked.store)
    renewal = RenewItem(owned.rid, owned.epoch, owned.token, owned.state)
    clocked.advance(20.0)

    assert clocked.store.renew([renewal]) == []
    record = clocked.store.record(owned.rid)
    assert record is not None
    assert record.owners == {owned.token: clocked.now_ms + 2000}


def test_renew_names_only_those_that_are_lost(state_store: StateStore) -> None:
    kept, lost = prefilling(state_store), prefilling(state_store)
    state_store.cancel(lost.rid, "user")
    renewals = [RenewItem(o.rid, o.epoch, o.token, o.state) for o in (kept, lost)]

    assert state_store.renew(renewals) == [(renewals[1], Final(RequestState.CANCELLED, "user"))]


def test_reaper_takes_over_when_the_lease_is_over(clocked: ClockedStore) -> None:
    owned = prefilling(clocked.store)
    clocked.store.append_batch([item(owned, [7])])
    for _ in range(5):  # the first reap is a gap: it begins a grace
        clocked.store.reap(0, idle=False)
        clocked.advance(0.5)

    reaped = clocked.store.reap(0, idle=False)

    assert [turn.rid for turn in reaped.turns] == [owned.rid]
    again = claimed(clocked.store, owned.rid, "w-2.1")
    assert (again.n, again.crash_attempts, again.epoch) == ([1], 1, owned.epoch + 2)


def test_a_lease_that_is_renewed_is_never_taken_over(clocked: ClockedStore) -> None:
    owned = prefilling(clocked.store)

    for _ in range(20):
        clocked.advance(0.5)
        assert clocked.store.renew([RenewItem(owned.rid, owned.epoch, owned.token, owned.state)]) == []
        assert clocked.store.reap(0, idle=True).turns == []


def test_after_an_outage_the_owners_get_one_lease_of_grace(clocked: ClockedStore) -> None:
    owned = prefilling(clocked.store)
    clocked.store.reap(0, idle=False)
    clocked.advance(30.0)

    assert clocked.store.reap(0, idle=False).turns == []
    assert clocked.store.renew([RenewItem(owned.rid, owned.epoch, owned.token, owned.state)]) == []


def test_clock_that_went_back_delays_a_takeover_by_a_lease_only(clocked: ClockedStore) -> None:
    clocked.advance(3600.0)
    owned = prefilling(clocked.store)
    clocked.store.reap(0, idle=False)
    clocked.advance(-3600.0)

    turns: list[Turn] = []
    for _ in range(10):
        turns += clocked.store.reap(0, idle=False).turns
        clocked.advance(0.5)

    assert [turn.rid for turn in turns] == [owned.rid]


def test_evict_needs_no_lease_and_spares_the_other_replica(state_store: StateStore) -> None:
    alone, hedged, other = (prefilling(state_store, token=f"w-1.{i}") for i in range(3))
    state_store.claim(hedged.rid, "w-2.1", hedge=True, replicas=2)
    state_store.handoff(other.rid, other.epoch, other.token, "w-10.1")

    evicted = state_store.evict("w-1", "exited")

    assert [turn.rid for turn in evicted.turns] == [alone.rid]
    assert evicted.num_requests == 2
    assert state_of(state_store, hedged.rid) is RequestState.PREFILLING
    assert state_of(state_store, other.rid) is RequestState.DECODING


def test_evict_without_proof_is_refused(state_store: StateStore) -> None:
    with pytest.raises(ValueError, match="proves nothing"):
        state_store.evict("w-1", "timeout")


def test_request_whose_workers_died_three_times_fails(state_store: StateStore) -> None:
    rid = accepted(state_store)
    for attempt in (1, 2, 3):
        assert claimed(state_store, rid, f"w-{attempt}.1").crash_attempts == attempt - 1
        state_store.evict(f"w-{attempt}", "exited")

    assert state_store.claim(rid, "w-4.1") == Final(RequestState.FAILED, "workers_lost")


# ---------------------------------------------------------------- repeated wake-ups
def test_lost_wake_up_is_repeated_when_the_cluster_idles(clocked: ClockedStore) -> None:
    request = make_request()
    first = clocked.store.accept(request).turns[0]
    clocked.advance(1.1)

    assert clocked.store.reap(0, idle=False).turns == [], "it may still lie in the broker's queue"
    (again,) = clocked.store.reap(0, idle=True).turns
    assert again.rid == request.rid
    assert again.wake_n > first.wake_n


def test_wake_ups_are_repeated_at_a_bounded_rate(clocked: ClockedStore) -> None:
    for _ in range(200):
        accepted(clocked.store)
    clocked.advance(1.1)

    turns = [len(clocked.store.reap(0, idle=True).turns) for _ in range(4)]
    clocked.advance(0.4)
    later = len(clocked.store.reap(0, idle=True).turns)

    assert sum(turns) == 50
    assert later == 20


def test_wake_up_that_waits_no_longer_than_its_queue_is_not_repeated(clocked: ClockedStore) -> None:
    """500 at once, 20 claims a second: a message is in time for 50 s."""
    rids = [accepted(clocked.store) for _ in range(500)]
    for i in range(40):
        clocked.advance(0.5)
        for rid in rids[10 * i : 10 * i + 10]:
            claimed(clocked.store, rid, "w-1.1")
            clocked.store.cancel(rid, "done")
        assert clocked.store.reap(0, idle=False).turns == []


def test_room_that_lost_a_request_gets_it_back(clocked: ClockedStore) -> None:
    rid = accepted(clocked.store)
    clocked.raw.delete("cel:{s00}:dispatched")
    clocked.raw.zadd("cel:{s00}:dispatched", {"phantom-s00": 1})
    clocked.advance(1.1)

    assert [turn.rid for turn in clocked.store.reap(0, idle=False).turns] == [rid]
    assert clocked.raw.zrange("cel:{s00}:dispatched", 0, -1) == [rid.encode()]
