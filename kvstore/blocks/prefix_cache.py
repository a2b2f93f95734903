"""Full blocks found again by chained content hash, so that a shared prefix is computed once.

Equal hashes (see `prefix_keys`) mean equal KV. The blocks stay in the pool: held, or free and cached until
`BlockPool.allocate` evicts them. With tiers an evicted block goes on living there, and is copied back into a block of
its own when its content is wanted again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

from kvstore.blocks.block_pool import BlockPool
from kvstore.blocks.prefix_keys import block_keys


class BlockTiers(Protocol):
    """Where evicted blocks live on, over the memory of one region; see `kvstore.tiers`."""

    def spill(self, key: bytes, block_id: int, /) -> None: ...
    def restore(self, key: bytes, block_id: int, /) -> bool: ...
    def prefetch(self, keys: Iterator[bytes], /) -> frozenset[bytes]: ...


@dataclass
class CacheStats:
    """Totals since the start. Tokens of `match` calls only; blocks are counted at `insert` and eviction."""

    query_tokens: int = 0
    hit_tokens: int = 0
    inserted_blocks: int = 0
    evicted_blocks: int = 0
    restored_blocks: int = 0  # of `hit_tokens`, those that a tier brought back


class PrefixCache:
    """Content hash -> block of one pool. Not thread-safe: the engine thread owns it."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        policy: Literal["lru", "fifo"] | str = "lru",
        tiers: BlockTiers | None = None,
    ) -> None:
        if policy not in ("lru", "fifo"):
            raise ValueError(f"eviction policy is {policy!r}; expected `lru` or `fifo` (kv.eviction)")
        self.stats = CacheStats()
        self._pool = pool
        self._block_size = block_size
        self._is_fifo = policy == "fifo"
        self._tiers = tiers
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
        for block_hash in self._wanted(token_ids, salt):
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        self._pool.share(found)
        self.stats.query_tokens += len(token_ids)
        self.stats.hit_tokens += len(found) * self._block_size
        return found

    def restore(self, token_ids: Sequence[int], block_table: Sequence[int], first: int, *, salt: bytes | str) -> int:
        """Fill held blocks with what the tiers have of the prefix, from block `first` on; how many were filled.

        They become findable by `insert`, as computed ones do. The others' content is undefined, as it was.
        """
        if self._tiers is None:
            return 0
        count = 0
        for block_hash, block_id in zip(
            islice(self._wanted(token_ids, salt), first, None), block_table[first:], strict=False
        ):
            if not self._tiers.restore(block_hash, block_id):
                break
            count += 1
        self.stats.hit_tokens += count * self._block_size
        self.stats.restored_blocks += count
        return count

    def prefetch(self, token_ids: Sequence[int], *, salt: bytes | str) -> frozenset[bytes]:
        """Have the tiers bring near what `restore` may want of this prefix; keys of what is still under way."""
        if self._tiers is None:
            return frozenset()
        return self._tiers.prefetch(key for key in self._wanted(token_ids, salt) if key not in self._by_hash)

    def insert(self, token_ids: Sequence[int], block_table: Sequence[int], *, salt: bytes | str) -> None:
        """Make the full blocks of a held block table findable. Their KV must be complete and never change again.

        A content that is cached already keeps its first block; a partly filled last block is left out.
        """
        num_full = min(len(token_ids) // self._block_size, len(block_table))
        self.adopt(self._hashes(token_ids, num_full, salt), block_table)

    def hold(self, keys: Sequence[bytes], first: int) -> list[int]:
        """Blocks of `keys[first:]` as far as they are cached in a row, one reference taken on each."""
        found: list[int] = []
        for key in islice(keys, first, None):
            block_id = self._by_hash.get(key)
            if block_id is None:
                break
            found.append(block_id)
        self._pool.share(found)
        return found

    def count(self, keys: Sequence[bytes]) -> int:
        """How many of `keys` are cached in a row, from the first on."""
        return next((index for index, key in enumerate(keys) if key not in self._by_hash), len(keys))

    def adopt(self, keys: Iterable[bytes], block_ids: Sequence[int]) -> None:
        """Make held blocks findable under these hashes; as `insert`, for KV that somebody else computed."""
        for block_hash, block_id in zip(keys, block_ids, strict=False):
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

    def _wanted(self, token_ids: Sequence[int], salt: bytes | str) -> Iterator[bytes]:
        """Hashes of the full blocks that need not be computed: all but what holds the last token."""
        return self._hashes(token_ids, (len(token_ids) - 1) // self._block_size, salt)

    def _hashes(self, token_ids: Sequence[int], num_blocks: int, salt: bytes | str) -> Iterator[bytes]:
        return block_keys(token_ids, num_blocks, self._block_size, salt=salt)

    def _forget(self, block_id: int) -> None:
        block_hash = self._hash_of.pop(block_id)
        del self._by_hash[block_hash]
        self.stats.evicted_blocks += 1
        if self._tiers is not None:
            self._tiers.spill(block_hash, block_id)
