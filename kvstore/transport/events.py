"""What the `kv` thread tells the engine thread. Read by `KVNode.poll_events`, in order."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.address import KVAddress


# ---------------------------------------------------------------- at the receiver
@dataclass(frozen=True, slots=True)
class ReserveRequested:
    """A writer asks for `num_blocks` of ours: answer by `KVNode.grant`."""

    xfer: str
    rid: str
    epoch: int
    token: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """KV is complete and its checksum held: hand off, then `KVNode.settle`.

    `blocks` are all of the grant, in its order; the first ones hold `num_tokens` tokens. `transfer_s` is the time
    spent moving `num_bytes`: copying at the writer (shm), or receiving here (tcp); waits for compute are not in it.
    `verified_s` is when it held, on the node's clock: the engine may hear of it a step later.
    """

    xfer: str
    rid: str
    epoch: int
    token: str
    blocks: tuple[int, ...]
    num_tokens: int
    state: bytes
    num_bytes: int
    transfer_s: float
    verified_s: float = 0.0


@dataclass(frozen=True, slots=True)
class BlocksFree:
    """Nobody writes these blocks of a grant any more: back to the pool."""

    blocks: tuple[int, ...]
    xfer: str


@dataclass(frozen=True, slots=True)
class FetchRequested:
    """A peer wants blocks [first, ...) of the chain that `keys` name pushed to `address`. Push them, or decline."""

    xfer: str  # the peer's name for it
    link: int  # the connection it came over
    keys: tuple[bytes, ...]
    first: int
    address: KVAddress


# ---------------------------------------------------------------- at the writer
@dataclass(frozen=True, slots=True)
class GrantReceived:
    xfer: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class GrantRefused:
    """No grant: no_space, quota, timeout, backoff, or why the link could not be made. The transfer is closed.

    `detail`: of two workers that do not fit, what differs and the values of both.
    """

    xfer: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FetchDeclined:
    """The peer that was asked for a prefix does not have it, or no time for it."""

    xfer: str


@dataclass(frozen=True, slots=True)
class Handed:
    """The receiver owns the sequence now. The source blocks may be reused."""

    xfer: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The KV arrived, but the receiver's `handoff` was refused: somebody else owns the request, or it ended."""

    xfer: str
    reason: str


@dataclass(frozen=True, slots=True)
class PushFailed:
    """The transfer is closed, and its source blocks are not read any more; another receiver may be tried."""

    xfer: str
    reason: str


@dataclass(frozen=True, slots=True)
class SourceFree:
    """Answer to `KVNode.abandon`: the source blocks may be reused."""

    xfer: str


Event = (
    ReserveRequested
    | Arrived
    | BlocksFree
    | FetchRequested
    | FetchDeclined
    | GrantReceived
    | GrantRefused
    | Handed
    | Refused
    | PushFailed
    | SourceFree
)
