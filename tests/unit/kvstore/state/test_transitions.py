from __future__ import annotations

import pytest

from kvstore.state.transitions import FINAL_STATES, TRANSITIONS, Event, RequestState, TransitionRefused, advance


def test_table_has_a_row_for_every_state() -> None:
    assert set(TRANSITIONS) == set(RequestState)


def test_every_event_happens_somewhere() -> None:
    assert {event for row in TRANSITIONS.values() for event in row} == set(Event)


@pytest.mark.parametrize("state", RequestState)
def test_every_state_reaches_a_final_one(state: RequestState) -> None:
    reached, new = {state}, {state}
    while new:
        new = {after for before in new for after in TRANSITIONS[before].values()} - reached
        reached |= new
    assert reached & FINAL_STATES


@pytest.mark.parametrize("state", sorted(FINAL_STATES))
def test_a_final_state_never_changes(state: RequestState) -> None:
    assert TRANSITIONS[state] == {}


@pytest.mark.parametrize("state", sorted(set(RequestState) - FINAL_STATES))
def test_cancel_and_deadline_end_whatever_is_not_final(state: RequestState) -> None:
    assert advance(state, Event.CANCELLED) is RequestState.CANCELLED
    assert advance(state, Event.DEADLINE_PASSED) is RequestState.EXPIRED


def test_refusal_names_state_event_and_what_is_allowed() -> None:
    with pytest.raises(TransitionRefused, match=r"HANDED_OFF cannot happen to a request that is QUEUED.*CLAIMED"):
        advance(RequestState.QUEUED, Event.HANDED_OFF)
