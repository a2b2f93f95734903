"""What a worker knows of the speed of one of its links: sent with the engine's figures, read by routing."""

from __future__ import annotations

import msgspec


class LinkReport(msgspec.Struct, frozen=True, array_like=True):
    """Of all links to one host over one protocol.

    Attributes:
        host_id: of the other side; "" stands for every host that was never met.
        num_transfers: that this was learned from; 0 is the table's figure.
        transfer_s: predicted for a transfer of the usual size of this worker.
    """

    host_id: str
    protocol: str
    base_s: float
    bytes_per_s: float
    num_transfers: int
    transfer_s: float
