"""KV blocks by id: who holds which block, which are found again by content, which are promised to a writer elsewhere.

Owns identity and states only: `BlockPool`, `PrefixCache`, `GrantTable` are pure classes with `check_invariants()`. Must
not know tensors, bytes, sockets, Redis or clocks; where time matters, it is passed in as `now_s`.
"""

from kvstore.blocks.block_pool import BlockPool
from kvstore.blocks.errors import BlockError, GrantError, NotHeld, OutOfBlocks
from kvstore.blocks.grant_actions import (
    Action,
    AskEngine,
    BlocksReleased,
    Delivered,
    SendFence,
    SendGrant,
    SendHanded,
    SendRefused,
    Verify,
)
from kvstore.blocks.grant_states import TRANSITIONS, GrantEvent, GrantState
from kvstore.blocks.grant_table import Grant, GrantTable, Reservation
from kvstore.blocks.prefix_cache import CacheStats, PrefixCache

__all__ = [
    "TRANSITIONS",
    "Action",
    "AskEngine",
    "BlockError",
    "BlockPool",
    "BlocksReleased",
    "CacheStats",
    "Delivered",
    "Grant",
    "GrantError",
    "GrantEvent",
    "GrantState",
    "GrantTable",
    "NotHeld",
    "OutOfBlocks",
    "PrefixCache",
    "Reservation",
    "SendFence",
    "SendGrant",
    "SendHanded",
    "SendRefused",
    "Verify",
]
