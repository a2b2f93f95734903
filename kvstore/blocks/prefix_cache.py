"""Full blocks found again by chained content hash, so that a shared prefix is computed once.

    hash(i) = xxh3_128(hash(i-1), token ids of block i)       hash(-1) = xxh3_128(salt)

Equal hashes mean equal tokens at equal positions under the same model and tenant (the salt), hence equal KV. The blocks
stay in the pool: held, or free and cached until `BlockPool.allocate` evicts them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import xxhash

from kvstore.blocks.block_pool import BlockPool


@dataclass
class CacheStats:
    """Totals since the start. Tokens of `match` calls only; blocks are counted at `insert` and eviction."""

    query_tokens: int = 0
    hit_tokens: int = 0
    inserted_blocks: int = 0
    evicted_blocks: int = 0


class PrefixCache:
    """Content hash -> block of one pool. Not thread-safe: the engine thread owns it."""

    def __init__(self, pool: BlockPool, block_size: int, policy: Literal["lru", "fifo"] | str = "lru") -> None:
        if policy not in ("lru", "fifo"):
            raise ValueError(f"eviction policy is {policy!r}; expected `lru` or `fifo` (kv.eviction)")
        self.stats = CacheStats()
        self._pool = pool
        self._block_size = block_size
        self._is_fifo = policy == "fifo"
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        pool.watch_evictions(self._forget)

    @property
    def evictable(self) -> int:
        """Cached blocks that nobody holds; they count as free."""
        return self._pool.num_cached

    @property
    def num_findable(self) -> int:
        return len(self._by_hash)

    def match(self, token_ids: Sequence[int], *, salt: bytes | str) -> list[int]:
        """Longest cached prefix as full blocks, one reference taken on each; give them back by `pool.free`.

        Never the whole of `token_ids`: at least one token is left to compute, since its logits are wanted.
        """
        found: list[int] = []
        for block_hash in self._hashes(token_ids, (len(token_ids) - 1) // self._block_size, salt):
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        self._pool.share(found)
        self.stats.query_tokens += len(token_ids)
        self.stats.hit_tokens += len(found) * self._block_size
        return found

    def insert(self, token_ids: Sequence[int], block_table: Sequence[int], *, salt: bytes | str) -> None:
        """Make the full blocks of a held block table findable. Their KV must be complete and never change again.

        A content that is cached already keeps its first block; a partly filled last block is left out.
        """
        num_full = min(len(token_ids) // self._block_size, len(block_table))
        for block_hash, block_id in zip(self._hashes(token_ids, num_full, salt), block_table, strict=False):
            if block_hash in self._by_hash or block_id in self._hash_of:
                continue
            self.stats.inserted_blocks += 1
            self._pool.set_findable(block_id, evict_key=self.stats.inserted_blocks if self._is_fifo else None)
            self._by_hash[block_hash] = block_id
            self._hash_of[block_id] = block_hash

    def check_invariants(self) -> None:
        """Both directions agree, and no blank block is findable.

        Raises:
            AssertionError: a bug.
        """
        self._pool.check_invariants()
        assert {block: key for key, block in self._by_hash.items()} == self._hash_of, "hash and block tables disagree"

    def _hashes(self, token_ids: Sequence[int], num_blocks: int, salt: bytes | str) -> Iterator[bytes]:
        parent = xxhash.xxh3_128_digest(salt.encode() if isinstance(salt, str) else salt)
        for start in range(0, num_blocks * self._block_size, self._block_size):
            block_ids = array("q", token_ids[start : start + self._block_size])
            parent = xxhash.xxh3_128_digest(parent + block_ids.tobytes())
            yield parent

    def _forget(self, block_id: int) -> None:
        del self._by_hash[self._hash_of.pop(block_id)]
        self.stats.evicted_blocks += 1
