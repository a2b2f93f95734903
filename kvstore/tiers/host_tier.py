"""Evicted blocks in host memory: one slab of equal slots, the least recently used goes first."""

from __future__ import annotations

import mmap
from collections import OrderedDict

import xxhash

from kvstore.tiers.errors import TierError


class HostTier:
    """Content hash -> bytes of one block. Not thread-safe: the engine thread owns it.

    Args:
        max_bytes: of the slab. Its pages cost memory only once they were used.
        block_bytes: of each block.

    Raises:
        TierError: not even one block fits.
    """

    def __init__(self, max_bytes: int, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.num_slots = max_bytes // block_bytes
        if self.num_slots < 1:
            raise TierError(what=f"{max_bytes} bytes of host memory", expected=f"at least one block of {block_bytes}")
        self._memory = mmap.mmap(-1, self.num_slots * block_bytes)
        self._view = memoryview(self._memory)
        self._slots: OrderedDict[bytes, tuple[int, int]] = OrderedDict()  # key -> (slot, xxh3_64), oldest use first
        self._free = list(range(self.num_slots))

    def __contains__(self, key: bytes) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def put(self, key: bytes, pages: memoryview) -> None:
        """Keep a copy of `pages` (`block_bytes` bytes); for a key that is here this only counts as a use."""
        if key in self._slots:
            self._slots.move_to_end(key)
            return
        slot = self._free.pop() if self._free else self._slots.popitem(last=False)[1][0]
        view = self._slot(slot)
        view[:] = pages
        self._slots[key] = (slot, xxhash.xxh3_64_intdigest(view))

    def read_into(self, key: bytes, pages: memoryview) -> bool | None:
        """Copy a block into `pages`. None: not here. False: it was damaged; it is forgotten, `pages` is garbage."""
        found = self._slots.get(key)
        if found is None:
            return None
        slot, digest = found
        pages[:] = self._slot(slot)
        if xxhash.xxh3_64_intdigest(pages) != digest:  # what was copied is checked, not what lies in the slab
            del self._slots[key]
            self._free.append(slot)
            return False
        self._slots.move_to_end(key)
        return True

    def _slot(self, slot: int) -> memoryview:
        return self._view[slot * self.block_bytes : (slot + 1) * self.block_bytes]
