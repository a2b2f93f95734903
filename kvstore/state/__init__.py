"""All request state in Redis: records, token logs, feeds, leases, wake-ups, and the registry of workers.

Owns the function library (`lua/`), the keys and the formats in them; the server enforces the transition table. Knows
nothing of tensors, Celery or HTTP, and decides nothing about who computes what: it says who may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvstore.state.entries import FeedItem, FinEntry, TokenEntry, TokenLogprobs
from kvstore.state.records import (
    AppendItem,
    ClaimItem,
    HandoffItem,
    NewRequest,
    Record,
    RenewItem,
    RequestBody,
    SpansItem,
    WorkerBeat,
)
from kvstore.state.replies import (
    Accepted,
    AppendReply,
    At,
    Attached,
    Busy,
    Cancelled,
    Claimed,
    Dup,
    Evicted,
    Final,
    Fork,
    Gap,
    Gone,
    HandedOff,
    Log,
    Ok,
    Reaped,
    Released,
    Stale,
    Turn,
)
from kvstore.state.transitions import FINAL_STATES, TRANSITIONS, Event, RequestState, advance

if TYPE_CHECKING:
    from kvstore.state.embedded import EmbeddedValkey
    from kvstore.state.store import StateStore

__all__ = [
    "FINAL_STATES",
    "TRANSITIONS",
    "Accepted",
    "AppendItem",
    "AppendReply",
    "At",
    "Attached",
    "Busy",
    "Cancelled",
    "ClaimItem",
    "Claimed",
    "Dup",
    "EmbeddedValkey",
    "Event",
    "Evicted",
    "FeedItem",
    "FinEntry",
    "Final",
    "Fork",
    "Gap",
    "Gone",
    "HandedOff",
    "HandoffItem",
    "Log",
    "NewRequest",
    "Ok",
    "Reaped",
    "Record",
    "Released",
    "RenewItem",
    "RequestBody",
    "RequestState",
    "SpansItem",
    "Stale",
    "StateStore",
    "TokenEntry",
    "TokenLogprobs",
    "Turn",
    "WorkerBeat",
    "advance",
]


def __getattr__(name: str) -> Any:
    """The two names that need redis-py come at first use: the engine process imports this package for its formats."""
    if name == "StateStore":
        from kvstore.state.store import StateStore

        return StateStore
    if name == "EmbeddedValkey":
        from kvstore.state.embedded import EmbeddedValkey

        return EmbeddedValkey
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
