"""What `GrantTable` tells its owner to do. `peer` is the owner's own id of the connection to the writer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AskEngine:
    """A new reservation: let the engine choose blocks, then call `answer`."""

    xfer: str


@dataclass(frozen=True, slots=True)
class SendGrant:
    peer: int
    xfer: str
    grant_id: str
    serial: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SendRefused:
    peer: int
    xfer: str
    reason: str


@dataclass(frozen=True, slots=True)
class SendHanded:
    peer: int
    xfer: str


@dataclass(frozen=True, slots=True)
class SendFence:
    """Repeated until the writer answers: stop writing, for good, and say so."""

    peer: int
    xfer: str
    grant_id: str


@dataclass(frozen=True, slots=True)
class Verify:
    """A COMMIT came: check pages and checksum, then call `verdict`. The writer writes no more."""

    xfer: str


@dataclass(frozen=True, slots=True)
class Delivered:
    """Verified: the engine may hand off and then `settle`."""

    xfer: str


@dataclass(frozen=True, slots=True)
class BlocksReleased:
    """Nobody writes these blocks any more, and they hold nothing of worth: back to the pool."""

    xfer: str
    blocks: tuple[int, ...]


Action = AskEngine | SendGrant | SendRefused | SendHanded | SendFence | Verify | Delivered | BlocksReleased
