"""The states of a request, and the one table of how they change.

    QUEUED ──claimed──> PREFILLING ──handed off──> DECODING ──last fin──> FINISHED
      ^ ^────released, lease over────┘                │  (drain: handed off again)
      └──────────released, lease over─────────────────┘   any of the three: FAILED, CANCELLED, EXPIRED

The functions in `lua/` enforce this table inside the state server; `tests/contract/test_state_table.py` drives every
state with every function and compares. "Transferring" is a phase shown to people, not a state: no rule differs.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class RequestState(StrEnum):
    QUEUED = "QUEUED"
    PREFILLING = "PREFILLING"
    DECODING = "DECODING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"


class Event(StrEnum):
    """What can change a state. Each is one function of the library, or its guard."""

    CLAIMED = "CLAIMED"  # claim
    HANDED_OFF = "HANDED_OFF"  # handoff, by an owner of the right epoch
    LAST_FIN = "LAST_FIN"  # append_batch with the end of the last open choice
    RELEASED = "RELEASED"  # release, and no owner is left
    LEASES_OVER = "LEASES_OVER"  # reap after every lease, or evict with proof; crashes < 3
    CRASHED_TOO_OFTEN = "CRASHED_TOO_OFTEN"  # the same, for the third time
    GAVE_UP = "GAVE_UP"  # finish(FAILED), by an owner of the right epoch
    ADOPTED_PREFILLING = "ADOPTED_PREFILLING"  # a caller with a newer epoch than the record's, which lost writes
    ADOPTED_DECODING = "ADOPTED_DECODING"
    CANCELLED = "CANCELLED"  # cancel
    DEADLINE_PASSED = "DEADLINE_PASSED"  # any function, or the reaper


FINAL_STATES: Final = frozenset(
    {RequestState.FINISHED, RequestState.FAILED, RequestState.CANCELLED, RequestState.EXPIRED}
)

_ANY_TIME: Final = {
    Event.ADOPTED_PREFILLING: RequestState.PREFILLING,
    Event.ADOPTED_DECODING: RequestState.DECODING,
    Event.CANCELLED: RequestState.CANCELLED,
    Event.DEADLINE_PASSED: RequestState.EXPIRED,
}
_OWNED: Final = {
    **_ANY_TIME,
    Event.HANDED_OFF: RequestState.DECODING,
    Event.LAST_FIN: RequestState.FINISHED,
    Event.RELEASED: RequestState.QUEUED,
    Event.LEASES_OVER: RequestState.QUEUED,
    Event.CRASHED_TOO_OFTEN: RequestState.FAILED,
    Event.GAVE_UP: RequestState.FAILED,
}

TRANSITIONS: Final[dict[RequestState, dict[Event, RequestState]]] = {
    RequestState.QUEUED: {**_ANY_TIME, Event.CLAIMED: RequestState.PREFILLING},
    RequestState.PREFILLING: _OWNED,
    RequestState.DECODING: _OWNED,
    **{state: {} for state in FINAL_STATES},
}


class TransitionRefused(ValueError):
    """The table has no such row: the caller acts on a state that the request is not in."""

    def __init__(self, state: RequestState, event: Event) -> None:
        allowed = ", ".join(TRANSITIONS[state]) or "nothing: the state is final"
        super().__init__(f"{event} cannot happen to a request that is {state}. Allowed there: {allowed}.")
        self.state = state
        self.event = event


def advance(state: RequestState, event: Event) -> RequestState:
    """The state after `event`.

    Raises:
        TransitionRefused: not in the table.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise TransitionRefused(state, event) from None
