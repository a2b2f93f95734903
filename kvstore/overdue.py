"""Who leaves a FENCE unanswered: told by the receiver's node, carried by the beat, acted on by the supervisor."""

from __future__ import annotations

import msgspec


class OverdueWriter(msgspec.Struct, frozen=True, kw_only=True):
    """A writer whose blocks stay quarantined. On this host (`pid`) it may be killed; another host's needs an alert.

    Attributes:
        peer: incarnation of the writer, or "" where the connection has not proven one.
        pid: of the writer's process as the kernel told the receiver; 0 over tcp.
        num_blocks: what waits for its answer.
    """

    xfer: str
    peer: str
    pid: int
    num_blocks: int
