"""Fixed pool of KV blocks with reference counts.

Owns block *identity* only: no tensors, no I/O, no clock. The model runner owns the memory that these ids index.
After PagedAttention (Kwon et al., SOSP 2023), section 4.

    free, blank ──allocate──▶ held (ref >= 1) ──free to ref 0──▶ free, blank        its content is not findable
         ▲                        ▲    └──────free to ref 0──▶ free, cached         its content is findable
         └──evicted by allocate───┼──────────────────────────────┘ │
                                  └──────share (a prefix hit)──────┘
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable

from kvstore.blocks.errors import NotHeld, OutOfBlocks


class BlockPool:
    """Hands out block ids. Not thread-safe: the engine thread owns it."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; a pool needs at least 1 block")
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._blank: deque[int] = deque(range(num_blocks))
        self._findable: dict[
            int, int | None
        ] = {}  # block -> its fixed eviction key (FIFO), or None: time of release (LRU)
        self._evict_keys: dict[int, int] = {}  # cached free blocks only
        self._evict_heap: list[tuple[int, int]] = []  # (key, block); entries that `_evict_keys` denies are stale
        self._releases = 0
        self._on_evict: Callable[[int], None] | None = None

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out: blank ones and cached ones that nobody holds."""
        return len(self._blank) + len(self._evict_keys)

    @property
    def num_used(self) -> int:
        """Blocks with a reference."""
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """The part of `num_free` whose content a prefix cache can still find."""
        return len(self._evict_keys)

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` free blocks, each with `ref_count == 1`: all of them, or none and an error.

        Blank ones first; then the cached ones that the eviction policy misses least.

        Raises:
            OutOfBlocks: fewer are free. The pool is unchanged.
        """
        if num_blocks > self.num_free:
            raise OutOfBlocks(needed=num_blocks, free=self.num_free, total=self.num_blocks)
        return [self._take_one() for _ in range(num_blocks)]

    def share(self, block_ids: Iterable[int]) -> None:
        """One more reference to each. A cached free block comes back to life.

        Raises:
            NotHeld: a block is blank. Nothing has changed.
        """
        ids = list(block_ids)
        for block_id in ids:
            if not self._is_held(block_id) and block_id not in self._evict_keys:
                raise NotHeld(block_id=block_id, verb="shared")
        for block_id in ids:
            self._evict_keys.pop(block_id, None)
            self._ref_counts[block_id] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """One reference less to each; at 0 the block is free. Pass a block table in token order.

        Raises:
            NotHeld: more references are given back than are held. Nothing has changed.
        """
        ids = list(block_ids)
        given_back: dict[int, int] = {}
        for block_id in ids:
            given_back[block_id] = given_back.get(block_id, 0) + 1
            if not 0 <= block_id < self.num_blocks or given_back[block_id] > self._ref_counts[block_id]:
                raise NotHeld(block_id=block_id, verb="freed")
        for block_id in reversed(ids):  # tail first: a shared prefix should be the last thing evicted
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._release(block_id)

    # ---------------------------------------------------------------- for PrefixCache
    def watch_evictions(self, on_evict: Callable[[int], None]) -> None:
        """`on_evict(block_id)` is called before a cached block is handed out blank."""
        self._on_evict = on_evict

    def set_findable(self, block_id: int, *, evict_key: int | None) -> None:
        """The content of a held block can be found from now on; so it stays cached when it is freed.

        Args:
            evict_key: the lowest is evicted first. None: the time of its last release counts.
        """
        if not self._is_held(block_id):
            raise NotHeld(block_id=block_id, verb="cached")
        self._findable[block_id] = evict_key

    def check_invariants(self) -> None:
        """Every block is in exactly one of: held, cached, blank.

        Raises:
            AssertionError: a bug; the message names the block.
        """
        blank = set(self._blank)
        assert len(blank) == len(self._blank), "a block is twice in the free list"
        for block_id, count in enumerate(self._ref_counts):
            places = (count > 0) + (block_id in self._evict_keys) + (block_id in blank)
            assert places == 1, f"block {block_id} with {count} references is in {places} states"
        assert set(self._evict_keys) <= set(self._findable), "a cached block cannot be found"
        assert not blank & set(self._findable), "a blank block can be found"
        live = {(key, block) for block, key in self._evict_keys.items()}
        assert live <= set(self._evict_heap), "a cached block can never be evicted"

    # ---------------------------------------------------------------- private
    def _is_held(self, block_id: int) -> bool:
        return 0 <= block_id < self.num_blocks and self._ref_counts[block_id] > 0

    def _take_one(self) -> int:
        block_id = self._blank.popleft() if self._blank else self._evict()
        self._ref_counts[block_id] = 1
        return block_id

    def _evict(self) -> int:
        while True:
            key, block_id = heapq.heappop(self._evict_heap)
            if self._evict_keys.get(block_id) == key:
                del self._evict_keys[block_id], self._findable[block_id]
                if self._on_evict is not None:
                    self._on_evict(block_id)
                return block_id

    def _release(self, block_id: int) -> None:
        if block_id not in self._findable:
            self._blank.append(block_id)
            return
        self._releases += 1
        key = self._findable[block_id]
        key = self._releases if key is None else key
        self._evict_keys[block_id] = key
        heapq.heappush(self._evict_heap, (key, block_id))
        if len(self._evict_heap) > 2 * self.num_blocks + 64:  # stale entries of blocks that were hit and freed again
            self._evict_heap = [(key, block) for block, key in self._evict_keys.items()]
            heapq.heapify(self._evict_heap)
