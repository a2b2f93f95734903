"""Movers of a link whose two ends keep KV differently: blocks are made in the receiver's layout, then moved as usual.

`shm` writes what it makes straight into the peer's pages. `tcp` makes it in a ring of buffers that the kernel sends
from: at most `TCP_WINDOW_BYTES` and one frame, taken again when they are sent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstore.reshard.dtypes import Words
from kvstore.reshard.pack import Packer, blocks_as_words, share_of_block
from kvstore.reshard.plan import Conversion
from kvstore.reshard.progress import Part, Progress
from kvstore.transport.connection import Connection
from kvstore.transport.frames import DataHeader, data_frame
from kvstore.transport.movers import SLICE_BYTES, TCP_FRAME_BYTES, TCP_WINDOW_BYTES, Pairs
from kvstore.transport.region import KVRegion
from kvstore.transport.transfers import Transfer

_ALL_TOKENS = 1 << 62  # of a block that is not the last one


class _Converting(ABC):
    """What both have in common: when which block goes, and what will lie in the receiver's pages."""

    def __init__(self, own: KVRegion, conversion: Conversion) -> None:
        self.conversion = conversion
        self._packer = Packer(conversion, own.buffer)

    def move(self, transfer: Transfer, pairs: Pairs, layer_lo: int, layer_hi: int) -> Iterator[int]:
        if transfer.progress is None:
            transfer.progress = Progress(self.conversion)
        progress = transfer.progress
        yield from self._send(transfer, progress.push(pairs, layer_lo, layer_hi), progress.table, _ALL_TOKENS)

    def complete(self, transfer: Transfer, src_blocks: Sequence[int], num_tokens: int) -> Iterator[int]:
        progress = transfer.progress or Progress(self.conversion)
        yield from self._send(transfer, progress.finish(src_blocks, num_tokens), progress.table, num_tokens)

    def finish(self, transfer: Transfer) -> Iterator[None]:  # noqa: ARG002  (a Mover's method)
        return iter(())

    def is_landing(self, xfer: str) -> bool:  # noqa: ARG002  (a Mover's method)
        return False

    def close(self) -> None:
        return None

    def _hash(self, transfer: Transfer, place: int, layer_lo: int, words: Words) -> None:
        """`words`: `[layers, ...]`, contiguous, what will lie in the receiver's pages of layers `layer_lo` on."""
        if transfer.cells is not None:
            first = place * self.conversion.destination.num_layers + layer_lo
            for k, layer in enumerate(words):
                transfer.cells.digests[first + k] = xxhash.xxh3_64_intdigest(layer)

    @abstractmethod
    def _send(
        self, transfer: Transfer, parts: Iterable[Part], table: Mapping[int, int], num_tokens: int
    ) -> Iterator[int]:
        """Make and move these parts; yields the bytes of each slice."""


class ConvertingShmMover(_Converting):
    """Strided copies into the peer's mapping; by way of a block in the caches where they are hashed."""

    def __init__(self, own: KVRegion, peer: KVRegion, conversion: Conversion) -> None:
        super().__init__(own, conversion)
        self._pages = blocks_as_words(peer.buffer, conversion.destination)

    def is_ready(self) -> bool:
        return True

    def _send(
        self, transfer: Transfer, parts: Iterable[Part], table: Mapping[int, int], num_tokens: int
    ) -> Iterator[int]:
        moved = 0
        for place, lo, hi in parts:
            out = share_of_block(self._pages, transfer.dst_blocks[place], self.conversion.share, lo, hi)
            if transfer.cells is None:
                self._packer.fill(out, table, place, num_tokens, lo, hi)
            else:  # what is hashed is what was made, not what has become of it in the peer's pages
                words = np.empty(self._packer.shape(hi - lo), dtype=self._pages.dtype)
                self._packer.fill(words, table, place, num_tokens, lo, hi)
                self._hash(transfer, place, lo, words)
                out[:] = words
            moved += (hi - lo) * self.conversion.share_layer_bytes
            if moved >= SLICE_BYTES:
                yield moved
                moved = 0
        yield moved


class ConvertingTcpMover(_Converting):
    """DATA frames of up to 1 MiB, gathered into buffers of the ring."""

    def __init__(self, own: KVRegion, connection: Connection, conversion: Conversion) -> None:
        super().__init__(own, conversion)
        self._connection = connection
        self._ring: list[tuple[NDArray[np.uint8], object]] = []  # buffer, and the frame that reads it

    def is_ready(self) -> bool:
        return self._connection.num_queued_bytes < TCP_WINDOW_BYTES

    def _send(
        self, transfer: Transfer, parts: Iterable[Part], table: Mapping[int, int], num_tokens: int
    ) -> Iterator[int]:
        for first, count, lo, hi in _frames(parts, self.conversion.wire_layer_bytes):
            part_bytes = (hi - lo) * self.conversion.wire_layer_bytes
            num_bytes = count * part_bytes
            buffer = self._take(num_bytes)
            for k in range(count):
                out = buffer[k * part_bytes : (k + 1) * part_bytes]
                self._hash(transfer, first + k, lo, self._packer.pack(out, table, first + k, num_tokens, lo, hi))
            header = data_frame(DataHeader(transfer.serial, transfer.epoch, first, count, lo, hi), num_bytes)
            frame = self._connection.send_pages(header, [buffer[:num_bytes].data], tag=transfer.xfer)
            self._ring.append((buffer, frame))
            yield num_bytes

    def _take(self, num_bytes: int) -> NDArray[np.uint8]:
        """A buffer that nobody reads any more, or one more; the window bounds how many there can be."""
        for index, (buffer, frame) in enumerate(self._ring):
            if not self._connection.is_reading(frame):
                del self._ring[index]
                if len(buffer) >= num_bytes:
                    return buffer
                break
        return np.empty(max(num_bytes, TCP_FRAME_BYTES), dtype=np.uint8)


def _frames(parts: Iterable[Part], layer_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Join parts of neighbouring places and equal layers: (first place, places, layers lo, hi)."""
    first, count, layers = 0, 0, (0, 0)
    for place, lo, hi in parts:
        max_count = max(1, TCP_FRAME_BYTES // ((hi - lo) * layer_bytes))
        if count and count < max_count and (place, (lo, hi)) == (first + count, layers):
            count += 1
            continue
        if count:
            yield first, count, *layers
        first, count, layers = place, 1, (lo, hi)
    if count:
        yield first, count, *layers
