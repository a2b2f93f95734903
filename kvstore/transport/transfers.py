"""States of a transfer at its writer. The one place where they change.

    RESERVING ─GRANT─▶ GRANTED ─COMMIT─▶ COMMITTING ─HANDED─▶ CLOSED         and from each to CLOSED:
                                                              REFUSED, FENCE, ABANDONED, GAVE_UP, LINK_LOST

CLOSED is for good: a GRANT that comes for a transfer which is closed, or not known, is never written to.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from kvstore.native.pages import CellDigests
from kvstore.reshard.progress import Progress
from kvstore.transport.events import Event, GrantRefused, Handed, PushFailed, Refused, SourceFree


class XferState(StrEnum):
    RESERVING = "RESERVING"
    GRANTED = "GRANTED"
    COMMITTING = "COMMITTING"
    CLOSED = "CLOSED"


class XferEvent(StrEnum):
    GRANT = "GRANT"
    COMMIT = "COMMIT"  # the engine has nothing more to push
    HANDED = "HANDED"
    REFUSED = "REFUSED"
    FENCE = "FENCE"
    ABANDONED = "ABANDONED"  # by the engine
    GAVE_UP = "GAVE_UP"  # no answer in time
    LINK_LOST = "LINK_LOST"


_S, _E = XferState, XferEvent
_ENDS: Final = dict.fromkeys((_E.REFUSED, _E.FENCE, _E.ABANDONED, _E.GAVE_UP, _E.LINK_LOST), _S.CLOSED)

TRANSITIONS: Final[dict[XferState, dict[XferEvent, XferState]]] = {
    _S.RESERVING: {_E.GRANT: _S.GRANTED, **_ENDS},
    _S.GRANTED: {_E.COMMIT: _S.COMMITTING, **_ENDS},
    _S.COMMITTING: {_E.HANDED: _S.CLOSED, **_ENDS},
    _S.CLOSED: {},
}


def advance(state: XferState, event: XferEvent) -> XferState:
    """The next state; the same one where the table has no entry."""
    return TRANSITIONS[state].get(event, state)


@dataclass(slots=True, eq=False)
class Transfer:
    """One reservation and what became of it. Owned by the `kv` thread."""

    xfer: str
    rid: str
    epoch: int
    token: str
    num_blocks: int
    reserve_ends_s: float  # no grant by then: give up
    deadline_s: float
    num_tokens: int = 0  # that the grant must hold; 0: as many as `num_blocks` of ours
    group: str = ""
    state: XferState = XferState.RESERVING
    grant_id: str = ""
    serial: int = 0
    dst_blocks: array[int] = field(default_factory=lambda: array("q"))  # as many as asked for, of the receiver's size
    num_dst_blocks: int = 0
    progress: Progress | None = None  # over a link that converts
    is_told: bool = False  # the receiver has been told of some slices (shm)
    cells: CellDigests | None = None  # of what was pushed; None: nothing is hashed while it moves
    num_bytes: int = 0
    num_hidden_bytes: int = 0  # of these, moved before the engine had nothing more to push
    busy_s: float = 0.0
    commit_frame: bytes = b""  # once it is sent
    next_commit_s: float = 0.0
    commit_ends_s: float = 0.0


def outcome(transfer: Transfer, event: XferEvent, reason: str, detail: str = "") -> Event:
    """What the engine is told when `event` closes a transfer in its present state."""
    if event is XferEvent.ABANDONED:
        return SourceFree(transfer.xfer)
    if event is XferEvent.HANDED:
        return Handed(transfer.xfer)
    if transfer.state is XferState.RESERVING:
        return GrantRefused(transfer.xfer, reason, detail)
    if event is XferEvent.REFUSED and reason == "handoff":
        return Refused(transfer.xfer, reason)
    return PushFailed(transfer.xfer, reason)  # also a wrong checksum: the KV here is whole, so try again
