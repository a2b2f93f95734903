"""Integrity of a transfer: xxh3_64 over who and what, then the bytes of all its blocks in the order of the grant.

Order, epoch and token count are inside, so a right page in a wrong place is as wrong as a flipped bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
import xxhash

from kvstore.transport.region import KVRegion


class TransferChecksum:
    """Incremental, so that the `kv` thread can serve its other links between two slices."""

    def __init__(self, *, xfer: str, epoch: int, num_tokens: int, state: bytes) -> None:
        self._hash = xxhash.xxh3_64(msgspec.msgpack.encode((xfer, epoch, num_tokens, state)))

    def update(self, region: KVRegion, block_ids: Iterable[int], slice_bytes: int) -> Iterator[None]:
        """Take in these blocks; pauses after about `slice_bytes` each time."""
        num_bytes = 0
        for block_id in block_ids:
            self._hash.update(region.block(block_id))  # releases the GIL for all but tiny blocks
            num_bytes += region.block_bytes
            if num_bytes >= slice_bytes:
                num_bytes = 0
                yield

    def update_views(self, views: Iterable[memoryview], slice_bytes: int) -> Iterator[None]:
        """The same for bytes that are no whole blocks of a region."""
        num_bytes = 0
        for view in views:
            self._hash.update(view)
            num_bytes += len(view)
            if num_bytes >= slice_bytes:
                num_bytes = 0
                yield

    def value(self) -> int:
        return int(self._hash.intdigest())
