"""How page runs get from our region into granted pages of a peer. Chosen once per link, at its handshake.

`shm` copies into the peer's own mapping: one copy, no staging. `tcp` sends from our pages; the peer receives into its.
`rdma` writes one-sided, see `rdma_mover`. All work in slices, so that the `kv` thread serves other links in between;
shm and tcp hash what they move (`transfer.cells`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Protocol

from kvstore.reshard.plan import Conversion
from kvstore.transport.connection import Connection
from kvstore.transport.frames import DataHeader, data_frame, pushed_frame
from kvstore.transport.region import KVRegion
from kvstore.transport.transfers import Transfer

SLICE_BYTES = 4 << 20
LAST_SLICE_BYTES = 1 << 20
MIN_TOLD_BYTES = 256 << 10  # telling the receiver costs more than it gains if there is less to hash
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
    """Of a link whose receiver keeps KV in another layout. Its blocks are the receiver's.

    Fills `Transfer.cells`, if there are any, with digests of what will lie in the receiver's pages.
    """

    conversion: Conversion

    def complete(self, transfer: Transfer, src_blocks: Sequence[int], num_tokens: int) -> Iterator[int]:
        """Move what waited for the number of tokens; yields as `move` does."""
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
    """Copies between two mappings, without the GIL. Tells the peer of large slices, so that it hashes beside us."""

    def __init__(self, own: KVRegion, peer: KVRegion, connection: Connection) -> None:
        self._own, self.peer, self._connection = own, peer, connection

    def is_ready(self) -> bool:
        return True

    def move(self, transfer: Transfer, pairs: Pairs, layer_lo: int, layer_hi: int) -> Iterator[int]:
        own, cells = self._own, transfer.cells
        run_bytes = (layer_hi - layer_lo) * own.layer_bytes
        for first, sources in _slices(pairs, run_bytes):
            targets, count = transfer.dst_blocks[first : first + len(sources)], len(sources)
            own.ops.copy(
                own.pages, self.peer.pages, sources, targets, first=first, lo=layer_lo, hi=layer_hi, cells=cells
            )
            num_bytes = run_bytes * count
            if cells is not None and (num_bytes >= MIN_TOLD_BYTES or transfer.is_told):
                transfer.is_told = True  # and of every later slice: one that was hashed may be written again
                header = DataHeader(transfer.serial, transfer.epoch, first, count, layer_lo, layer_hi)
                self._connection.send(pushed_frame(header))
            yield num_bytes


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
            own, sources, first = self._own, [src for src, _ in places], places[0][1]
            views = [own.run(src, layer_lo, layer_hi) for src in sources]
            num_bytes = run_bytes * len(views)
            if transfer.cells is not None:  # before the kernel reads them: one of the two finds them in a cache
                own.ops.hash(own.pages, sources, first=first, lo=layer_lo, hi=layer_hi, cells=transfer.cells)
            header = DataHeader(
                transfer.serial, transfer.epoch, places[0][1], len(places), layer_lo, layer_hi
            )  # fmt: skip
            self._connection.send_pages(data_frame(header, num_bytes), views, tag=transfer.xfer)
            yield num_bytes


def _slices(pairs: Pairs, run_bytes: int) -> Iterator[tuple[int, array[int]]]:
    """Split into (first place, own blocks) of places that follow one another, of about `SLICE_BYTES`.

    The last ones are shorter: the peer hashes a slice while the next is copied, and the last one with nobody beside it.
    """
    start, num_pairs = 0, len(pairs)
    while start < num_pairs:
        left_bytes = (num_pairs - start) * run_bytes
        slice_bytes = SLICE_BYTES if left_bytes > SLICE_BYTES else max(left_bytes // 2, LAST_SLICE_BYTES)
        end = start + max(1, slice_bytes // run_bytes)
        sources, places = zip(*pairs[start:end], strict=True)
        if places == tuple(range(places[0], places[0] + len(places))):
            yield places[0], array("q", sources)
        else:
            for group in _neighbours(pairs[start:end], len(places)):
                yield group[0][1], array("q", [source for source, _ in group])
        start = end


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
