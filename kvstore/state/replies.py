"""What the functions answer. Small frozen values; callers decide with `match` or `isinstance`.

Common: `Gone` (no record), `Final` (nothing changes any more), `Stale` (another owns it). What each caller does with
each reply is written beside the methods of `StateStore`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.state.entries import FinEntry, TokenEntry
from kvstore.state.records import RequestBody
from kvstore.state.transitions import FINAL_STATES, RequestState


@dataclass(frozen=True)
class Turn:
    """A wake-up that the caller sends: Celery task id `<rid>.<stage>.<wake_n>`."""

    rid: str
    wake_n: int


@dataclass(frozen=True)
class Ok:
    """Done, or had been done by the same call before."""


@dataclass(frozen=True)
class Gone:
    """No record: never accepted, lost, or past its time. `bad_record` says why if it is there but unreadable."""

    bad_record: str = ""


@dataclass(frozen=True)
class Final:
    """The request has ended; nothing was changed."""

    state: RequestState
    reason: str = ""


@dataclass(frozen=True)
class Stale:
    """Another owner has it, at `epoch`: stop, free the blocks."""

    epoch: int
    state: RequestState


@dataclass(frozen=True)
class Busy:
    """Somebody owns it already: ack the message and forget it."""

    state: RequestState


@dataclass(frozen=True)
class Gap:
    """The log ends at `n`, before the item: publish again from `n` out of the buffer."""

    n: int


@dataclass(frozen=True)
class Dup:
    """The log has `n` tokens already, beyond the item's index: set the cursor to `n`."""

    n: int


@dataclass(frozen=True)
class Fork:
    """Right index, but behind another text than the log's: release the request."""


@dataclass(frozen=True)
class At:
    """Refill refused: the log has `n` tokens, or another text."""

    n: int


AppendReply = Ok | Gap | Dup | Fork | Stale | Final | Gone


@dataclass(frozen=True)
class Accepted:
    """`status`: OK (new) | EXISTS (same body before: attach) | CONFLICT (same id, another body).

    `turns` also holds the current wake-up of an existing queued request: sending it again is harmless.
    """

    status: str
    state: RequestState
    n: list[int]
    turns: list[Turn]


@dataclass(frozen=True)
class Attached:
    """`n` tokens and `fin` per choice. If final: read the log first, then end the stream."""

    state: RequestState
    n: list[int]
    fin: list[bool]
    reason: str

    @property
    def final(self) -> bool:
        return self.state in FINAL_STATES


@dataclass(frozen=True)
class Claimed:
    """The caller owns it at `epoch`, and has all it needs but the ids so far (`read_ids` where any n > 0).

    `crash_attempts` >= 2: run it alone. `claimed_ms`: when, by the server's clock.
    """

    epoch: int
    n: list[int]
    attempts: int
    crash_attempts: int
    wake_n: int
    body: RequestBody
    remaining_s: float
    turns: list[Turn]
    fin: list[bool]
    claimed_ms: float = 0.0


@dataclass(frozen=True)
class HandedOff:
    """The caller owns it at `epoch`; its cursors are `n`."""

    epoch: int
    n: list[int]
    fin: list[bool]


@dataclass(frozen=True)
class Released:
    """QUEUED if no other owner is left. The caller sends `turns`, then frees."""

    state: RequestState
    turns: list[Turn]


@dataclass(frozen=True)
class Cancelled:
    """It was `state_before`, held by `owners` (tokens); `wake_n` is that of its last wake-up, to revoke."""

    state_before: RequestState
    wake_n: int
    owners: list[str]
    turns: list[Turn]


@dataclass(frozen=True)
class Reaped:
    """`turns`: send these. `expired`: their deadline passed; revoke (`wake_n` of the last wake-up)."""

    turns: list[Turn]
    expired: list[Turn]


@dataclass(frozen=True)
class Evicted:
    """Requests that lost an owner, and the wake-ups to send."""

    turns: list[Turn]
    num_requests: int


@dataclass(frozen=True)
class Log:
    """Entries of one choice, the first of which may begin before the position asked for."""

    entries: Sequence[TokenEntry]
    fin: FinEntry | None
