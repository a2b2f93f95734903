"""States of a grant: blocks of this receiver that a writer elsewhere may fill. The one place where a state changes.

                     ┌──────────── COMMIT_BAD, WRITER_DONE, CHANNEL_DEAD ───────────┐
    FREE ─RESERVED─▶ LEASED ─COMMIT_GOOD─▶ COMMITTED ─HANDED, HANDOFF_REFUSED─▶ FREE ◀┤
                     └─LEASE_OVER, CANCELLED, UNREACHABLE─▶ QUARANTINED ─COMMIT_*, ───┘
                                                             WRITER_DONE, CHANNEL_DEAD

A timeout alone never frees a block: only the writer's word after its last write, or the proven death of its channel.
What a state does not list leaves it as it is: late, doubled and crossed messages are normal.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class GrantState(StrEnum):
    FREE = "FREE"
    LEASED = "LEASED"
    COMMITTED = "COMMITTED"
    QUARANTINED = "QUARANTINED"


class GrantEvent(StrEnum):
    RESERVED = "RESERVED"
    COMMIT_GOOD = "COMMIT_GOOD"  # all pages and the checksum are right
    COMMIT_BAD = "COMMIT_BAD"  # wrong, but the writer is done
    LEASE_OVER = "LEASE_OVER"
    CANCELLED = "CANCELLED"  # by the receiver's engine
    UNREACHABLE = "UNREACHABLE"  # the writer is silent; it may still write
    WRITER_DONE = "WRITER_DONE"  # ABORT or FENCED, sent after the writer's last write
    CHANNEL_DEAD = "CHANNEL_DEAD"  # proven: nothing can be written any more
    HANDED = "HANDED"  # the blocks belong to a sequence now
    HANDOFF_REFUSED = "HANDOFF_REFUSED"


_S, _E = GrantState, GrantEvent

TRANSITIONS: Final[dict[GrantState, dict[GrantEvent, GrantState]]] = {
    _S.FREE: {_E.RESERVED: _S.LEASED},
    _S.LEASED: {
        _E.COMMIT_GOOD: _S.COMMITTED,
        _E.COMMIT_BAD: _S.FREE,
        _E.LEASE_OVER: _S.QUARANTINED,
        _E.CANCELLED: _S.QUARANTINED,
        _E.UNREACHABLE: _S.QUARANTINED,
        _E.WRITER_DONE: _S.FREE,
        _E.CHANNEL_DEAD: _S.FREE,
    },
    _S.QUARANTINED: {
        _E.COMMIT_GOOD: _S.FREE,  # it crossed the FENCE: refused, since the engine was told that it is lost
        _E.COMMIT_BAD: _S.FREE,
        _E.WRITER_DONE: _S.FREE,
        _E.CHANNEL_DEAD: _S.FREE,
    },
    _S.COMMITTED: {_E.HANDED: _S.FREE, _E.HANDOFF_REFUSED: _S.FREE},
}


def advance(state: GrantState, event: GrantEvent) -> GrantState:
    """The next state; the same one where the table has no entry."""
    return TRANSITIONS[state].get(event, state)
