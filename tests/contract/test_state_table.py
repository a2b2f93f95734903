"""The functions against the transition table: every state with every event, allowed and refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvstore.state import FINAL_STATES, TRANSITIONS, Event, RenewItem, RequestState
from kvstore.state.keys import record_key
from tests.conftest import ClockedStore
from tests.contract.state_requests import DEADLINE_S, FIN, Owned, in_state, item, state_of


def let_the_lease_pass(clocked: ClockedStore, _owned: Owned) -> None:
    """Reaps as a gateway does, so that the end of the lease is no outage with its grace."""
    clocked.store.reap(0, idle=False)
    clocked.advance(2.1)  # the first reap began a grace: it and the lease end together
    for _ in range(4):
        clocked.store.reap(0, idle=False)
        clocked.advance(0.9)


def crash_for_the_third_time(clocked: ClockedStore, owned: Owned) -> None:
    clocked.raw.hset(record_key(owned.rid), "crash_attempts", 2)
    let_the_lease_pass(clocked, owned)


ACTIONS: dict[Event, Callable[[ClockedStore, Owned], object]] = {
    Event.CLAIMED: lambda x, o: x.store.claim(o.rid, "w-9.1"),
    Event.HANDED_OFF: lambda x, o: x.store.handoff(o.rid, o.epoch, o.token, "w-9.1"),
    Event.LAST_FIN: lambda x, o: x.store.append_batch([item(o, [7], fin=FIN)]),
    Event.RELEASED: lambda x, o: x.store.release(o.rid, o.epoch, o.token),
    Event.LEASES_OVER: let_the_lease_pass,
    Event.CRASHED_TOO_OFTEN: crash_for_the_third_time,
    Event.GAVE_UP: lambda x, o: x.store.finish(o.rid, o.epoch, o.token, "engine_error"),
    Event.ADOPTED_PREFILLING: lambda x, o: x.store.renew([RenewItem(o.rid, 99, "w-9.1", "PREFILLING")]),
    Event.ADOPTED_DECODING: lambda x, o: x.store.renew([RenewItem(o.rid, 99, "w-9.1", "DECODING")]),
    Event.CANCELLED: lambda x, o: x.store.cancel(o.rid, "user"),
}
NO_OWNER_NEEDED = {Event.CLAIMED, Event.CANCELLED, Event.LEASES_OVER, Event.CRASHED_TOO_OFTEN}


def test_every_event_of_the_table_is_tried() -> None:
    assert {*ACTIONS, Event.DEADLINE_PASSED} == set(Event)


@pytest.mark.parametrize("event", ACTIONS)
@pytest.mark.parametrize("state", RequestState)
def test_the_functions_do_what_the_table_says(clocked: ClockedStore, state: RequestState, event: Event) -> None:
    owned = in_state(clocked, state)
    before = clocked.raw.hgetall(record_key(owned.rid))

    ACTIONS[event](clocked, owned)

    assert state_of(clocked.store, owned.rid) is TRANSITIONS[state].get(event, state)
    if state in FINAL_STATES and event is not Event.CRASHED_TOO_OFTEN:
        assert clocked.raw.hgetall(record_key(owned.rid)) == before, "a final record never changes"


@pytest.mark.parametrize("event", [e for e in ACTIONS if e not in NO_OWNER_NEEDED and "ADOPTED" not in e])
@pytest.mark.parametrize("state", [RequestState.PREFILLING, RequestState.DECODING])
@pytest.mark.parametrize("who", ["older epoch", "other token"])
def test_nobody_but_the_owner_changes_a_state(
    clocked: ClockedStore, state: RequestState, event: Event, who: str
) -> None:
    owned = in_state(clocked, state)
    other = (
        Owned(owned.rid, owned.epoch - 1, owned.token, owned.state)
        if who == "older epoch"
        else Owned(owned.rid, owned.epoch, "w-8.1", owned.state)
    )

    ACTIONS[event](clocked, other)

    record = clocked.store.record(owned.rid)
    assert record is not None
    assert (record.state, record.epoch, set(record.owners)) == (state, owned.epoch, {owned.token})
    assert record.n == [0]


ASKING = {
    "attach": lambda x, o: x.store.attach(o.rid, "gw-1"),
    "claim": ACTIONS[Event.CLAIMED],
    "append_batch": ACTIONS[Event.LAST_FIN],
    "handoff": ACTIONS[Event.HANDED_OFF],
    "renew": lambda x, o: x.store.renew([RenewItem(o.rid, o.epoch, o.token, o.state)]),
    "renew with a newer epoch": ACTIONS[Event.ADOPTED_DECODING],
    "release": ACTIONS[Event.RELEASED],
    "finish": ACTIONS[Event.GAVE_UP],
    "cancel": ACTIONS[Event.CANCELLED],
    "reap": lambda x, _: x.store.reap(0, idle=False),
    "evict": lambda x, o: x.store.evict(o.token.split(".")[0], "exited"),
    "phase": lambda x, o: x.store.set_phase(o.rid, "transferring"),
}


@pytest.mark.parametrize(
    ("state", "function"),
    [
        (state, function)
        for state in (RequestState.QUEUED, RequestState.PREFILLING, RequestState.DECODING)
        for function in ASKING
        if not (function == "evict" and state is RequestState.QUEUED)  # it belongs to no incarnation
    ],
)
def test_every_function_looks_at_the_deadline_first(clocked: ClockedStore, state: RequestState, function: str) -> None:
    owned = in_state(clocked, state)
    clocked.advance(DEADLINE_S)

    ASKING[function](clocked, owned)

    record = clocked.store.record(owned.rid)
    assert record is not None
    assert record.state is TRANSITIONS[state][Event.DEADLINE_PASSED]
    assert record.reason == "deadline_exceeded"
    assert clocked.store.read_log(owned.rid, 0, 0).fin is not None
