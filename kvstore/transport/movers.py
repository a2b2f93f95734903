"""How page runs get from our region into granted pages of a peer. Chosen once per link, at its handshake.

`shm` copies into the peer's own mapping: one copy, no staging. `tcp` sends from our pages; the peer receives into its.
`rdma` writes one-sided, see `rdma_mover`. All work in slices, so that the `kv` thread serves other links in between.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from kvstore.reshard.plan import Conversion
from kvstore.transport.connection import Connection
from kvstore.transport.frames import DataHeader, data_frame
from kvstore.transport.region import KVRegion
from kvstore.transport.transfers import Transfer

SLICE_BYTES = 4 << 20
TCP_FRAME_BYTES = 1 << 20
TCP_WINDOW_BYTES = 4 << 20  # queued per link: more would only delay FENCED and heartbeats behind it

Pairs = Sequence[tuple[int, int]]  # (own block, place in the grant)


class Mover(Protocol):
    def is_ready(self) -> bool:
        """False while the link takes no more; then the loop waits for the socket."""
        ...

    def move(self, transfer: Transfer, pairs: Pairs, layer_lo: int, layer_hi: int) -> Iterator[int]:
        """Move layers [lo, hi) of these blocks; yields the bytes of each slice."""
        ...

    def finish(self, transfer: Transfer) -> Iterator[None]:
        """Goes on when COMMIT may be sent behind what was moved."""
        ...

    def is_landing(self, xfer: str) -> bool:
        """True while something of it may still be written into the peer's pages, whatever frames are sent."""
        ...

    def close(self) -> None:
        """Nothing is moved after this."""
        ...


class ConvertingMover(Mover, Protocol):
    """Of a link whose receiver keeps KV in another layout. Its blocks are the receiver's."""

    conversion: Conversion

    def complete(self, transfer: Transfer, src_blocks: Sequence[int], num_tokens: int) -> Iterator[int]:
        """Move what waited for the number of tokens; yields as `move` does."""
        ...

    def arriving(self, src_blocks: Sequence[int], num_tokens: int) -> Iterator[memoryview]:
        """What will lie in the receiver's pages, in the order of the grant. Each view is good until the next."""
        ...


class _InOrder:
    """What a mover need not do whose pages have landed, or travel in front of the next frame."""

    def finish(self, transfer: Transfer) -> Iterator[None]:  # noqa: ARG002  (a Mover's method)
        return iter(())

    def is_landing(self, xfer: str) -> bool:  # noqa: ARG002  (a Mover's method)
        return False

    def close(self) -> None:
        return None


class ShmMover(_InOrder):
    """memmove between two mappings. ctypes releases the GIL for the time of each call."""

    def __init__(self, own: KVRegion, peer: KVRegion) -> None:
        self._own, self.peer = own, peer

    def is_ready(self) -> bool:
        return True

    def move(self, transfer: Transfer, pairs: Pairs, layer_lo: int, layer_hi: int) -> Iterator[int]:
        own, peer = self._own, self.peer
        offset, num_bytes = layer_lo * own.layer_bytes, (layer_hi - layer_lo) * own.layer_bytes
        is_whole = num_bytes == own.block_bytes
        max_blocks = max(1, SLICE_BYTES // num_bytes)
        moved = 0
        blocks = ((src, transfer.dst_blocks[place]) for src, place in pairs)
        for src, dst, count in _runs(blocks, max_blocks if is_whole else 1):
            ctypes.memmove(
                peer.address + dst * own.block_bytes + offset,
                own.address + src * own.block_bytes + offset,
                num_bytes * count,
            )
            moved += num_bytes * count
            if moved >= SLICE_BYTES:
                yield moved
                moved = 0
        yield moved


class TcpMover(_InOrder):
    """DATA frames of up to 1 MiB of neighbouring places, gathered from pages by the kernel."""

    def __init__(self, own: KVRegion, connection: Connection) -> None:
        self._own, self._connection = own, connection

    def is_ready(self) -> bool:
        return self._connection.num_queued_bytes < TCP_WINDOW_BYTES

    def move(self, transfer: Transfer, pairs: Pairs, layer_lo: int, layer_hi: int) -> Iterator[int]:
        run_bytes = (layer_hi - layer_lo) * self._own.layer_bytes
        max_places = max(1, TCP_FRAME_BYTES // run_bytes)
        for places in _neighbours(pairs, max_places):
            views = [self._own.run(src, layer_lo, layer_hi) for src, _ in places]
            num_bytes = run_bytes * len(views)
            header = DataHeader(
                transfer.serial, transfer.epoch, places[0][1], len(places), layer_lo, layer_hi
            )  # fmt: skip
            self._connection.send_pages(data_frame(header, num_bytes), views, tag=transfer.xfer)
            yield num_bytes


def _runs(blocks: Iterable[tuple[int, int]], max_count: int) -> Iterator[tuple[int, int, int]]:
    """Join (source, destination) that go on one after the other in both regions: (source, destination, count)."""
    start: tuple[int, int] | None = None
    count = 0
    for src, dst in blocks:
        if start is not None and count < max_count and (src, dst) == (start[0] + count, start[1] + count):
            count += 1
            continue
        if start is not None:
            yield start[0], start[1], count
        start, count = (src, dst), 1
    if start is not None:
        yield start[0], start[1], count


def _neighbours(pairs: Pairs, max_places: int) -> Iterator[list[tuple[int, int]]]:
    """Split into groups whose places follow one another."""
    group: list[tuple[int, int]] = []
    for pair in pairs:
        if group and (len(group) >= max_places or pair[1] != group[-1][1] + 1):
            yield group
            group = []
        group.append(pair)
    if group:
        yield group
