"""Blocks of sequences: taken at admission, grown while decoding, given back; with the prefix cache in between."""

from __future__ import annotations

from engines.scheduler.policy import BlockAllocator, PrefixLookup
from engines.sequence import Sequence
from kvstore.blocks import OutOfBlocks


class SequenceBlocks:
    """Fills `block_table` of the sequences of one scheduler. Owned by the engine thread."""

    def __init__(self, pool: BlockAllocator, prefix_cache: PrefixLookup | None, block_size: int) -> None:
        self._pool = pool
        self._prefix_cache = prefix_cache
        self._block_size = block_size

    def admit(self, sequence: Sequence, *, watermark_blocks: int = 0) -> bool:
        """Blocks for all tokens of a sequence without any, the cached ones first. All of them, or False and nothing.

        Args:
            watermark_blocks: these many must stay free.
        """
        assert not sequence.block_table, f"{sequence.seq_id} already owns blocks"
        cached: list[int] = []
        # Logits of cached positions are not computed, and prompt logprobs are made of them.
        if self._prefix_cache is not None and not sequence.wants_prompt_scores:
            cached = self._prefix_cache.match(sequence.token_slice(0, sequence.num_tokens), salt=sequence.tenant)
        num_new = self._blocks_of(max(sequence.num_tokens, sequence.num_reserved_tokens)) - len(cached)
        # Asked after the match: a cached block that got a reference is not free any more.
        if num_new + watermark_blocks > self._pool.num_free:
            self._pool.free(cached)
            return False
        try:
            new = self._pool.allocate(num_new)
        except OutOfBlocks:
            self._pool.free(cached)
            return False
        sequence.block_table = cached + new
        num_cached = len(cached) + self._restore(sequence, len(cached))
        sequence.num_computed_tokens = sequence.num_cached_tokens = num_cached * self._block_size
        return True

    def _restore(self, sequence: Sequence, first: int) -> int:
        if self._prefix_cache is None or sequence.wants_prompt_scores:
            return 0
        ids = sequence.token_slice(0, sequence.num_tokens)
        return self._prefix_cache.restore(ids, sequence.block_table, first, salt=sequence.tenant)

    def has_room(self, sequence: Sequence) -> bool:
        """Whether its blocks hold the tokens it has by now."""
        return len(sequence.block_table) * self._block_size >= sequence.num_tokens

    def grow(self, sequence: Sequence) -> bool:
        """Blocks for the tokens it has by now. False if there are none; the table is then unchanged."""
        num_new = self._blocks_of(sequence.num_tokens) - len(sequence.block_table)
        if num_new <= 0:
            return True
        try:
            sequence.block_table = sequence.block_table + self._pool.allocate(num_new)
        except OutOfBlocks:
            return False
        return True

    def stretch(self, sequence: Sequence, num_tokens: int, *, watermark_blocks: int) -> int:
        """Blocks for up to `num_tokens` more than it has, as long as `watermark_blocks` stay free.

        Returns:
            How many more its blocks hold.
        """
        num_wanted = self._blocks_of(sequence.num_tokens + num_tokens) - len(sequence.block_table)
        num_new = min(num_wanted, self._pool.num_free - watermark_blocks)
        if num_new > 0:
            sequence.block_table = sequence.block_table + self._pool.allocate(num_new)
        return min(num_tokens, len(sequence.block_table) * self._block_size - sequence.num_tokens)

    def trim(self, sequence: Sequence, *, at_least: int) -> None:
        """Give back blocks that hold no KV, but keep `at_least`."""
        num_kept = max(self._blocks_of(sequence.num_computed_tokens), at_least)
        self._pool.free(sequence.block_table[num_kept:])
        sequence.block_table = sequence.block_table[:num_kept]

    def take_back(self, sequence: Sequence) -> None:
        """Free all its blocks; it has no KV any more."""
        blocks, sequence.block_table, sequence.num_computed_tokens = sequence.block_table, [], 0
        self._pool.free(blocks)

    def remember(self, sequence: Sequence) -> None:
        """Make its full, computed blocks findable."""
        if self._prefix_cache is not None:
            ids = sequence.token_slice(0, sequence.num_computed_tokens)
            self._prefix_cache.insert(ids, sequence.block_table, salt=sequence.tenant)

    def _blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
