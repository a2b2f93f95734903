"""Integrity of a transfer: xxh3_64 over who and what, then the digests of its cells by place and layer.

    pushes, in any order ──▶ CellDigests (place, layer) ──▶ COMMIT: xxh3_64(xfer, epoch, tokens, state, digests)

A cell is hashed while it is moved, or as soon as it has landed; only what nobody has hashed by then waits for COMMIT.
Place, layer, epoch and token count are inside, so a right page in a wrong place is as wrong as a flipped bit.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

import msgspec
import xxhash

from kvstore.native.pages import CellDigests
from kvstore.transport.memory import PageMemory


class TransferChecksum:
    """Incremental, so that the `kv` thread can serve its other links between two slices.

    Args:
        cells: what is known already; a cell whose digest is of another block than it should be is hashed again.
    """

    def __init__(
        self, *, xfer: str, epoch: int, num_tokens: int, state: bytes, cells: CellDigests | None = None
    ) -> None:
        self._hash = xxhash.xxh3_64(msgspec.msgpack.encode((xfer, epoch, num_tokens, state)))
        self._cells = cells

    def update(self, region: PageMemory, block_ids: Sequence[int], slice_bytes: int) -> Iterator[None]:
        """Take in these blocks, which are the places from 0 on; pauses after about `slice_bytes` that it hashed."""
        cells = self._cells or CellDigests(len(block_ids), region.num_layers)
        cell, num_cells = 0, len(block_ids) * region.num_layers
        while True:
            cell = region.ops.fill(region.pages, block_ids, cells=cells, start=cell, max_bytes=slice_bytes)
            if cell >= num_cells:
                break
            yield
        self._hash.update(cells.packed(len(block_ids)))

    def update_parts(self, cells: Iterable[Iterable[memoryview]], slice_bytes: int) -> Iterator[None]:
        """The same for cells of which only some runs are meant, in the order of places and layers."""
        digests, num_bytes = array("Q"), 0
        for runs in cells:
            one = xxhash.xxh3_64()
            for run in runs:
                one.update(run)
                num_bytes += len(run)
            digests.append(one.intdigest())
            if num_bytes >= slice_bytes:
                num_bytes = 0
                yield
        self.update_digests(memoryview(digests).cast("B"))

    def update_digests(self, digests: memoryview) -> None:
        """Take in cells that were hashed before."""
        self._hash.update(digests)

    def value(self) -> int:
        return int(self._hash.intdigest())
