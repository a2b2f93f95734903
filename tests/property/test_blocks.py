"""Sequences that come, share prefixes, grow and end in any order: blocks are never lost, shared by mistake or stale."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.blocks import BlockPool, OutOfBlocks, PrefixCache

BLOCK_SIZE, NUM_BLOCKS = 2, 7
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=9)


class Blocks(RuleBasedStateMachine):
    """`content` says what a block really holds, as the chain of all tokens before it and its own."""

    @initialize(policy=st.sampled_from(["lru", "fifo"]))
    def start(self, policy: str) -> None:
        self.pool = BlockPool(NUM_BLOCKS)
        self.cache = PrefixCache(self.pool, BLOCK_SIZE, policy)
        self.live: list[tuple[list[int], list[int]]] = []
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}

    @rule(token_ids=tokens, salt=st.sampled_from(["a", "b"]))
    def sequence_begins(self, token_ids: list[int], salt: str) -> None:
        table = self.cache.match(token_ids, salt=salt)
        assert len(table) * BLOCK_SIZE < len(token_ids)
        for i, block in enumerate(table):
            assert self.content[block] == (salt, tuple(token_ids[: (i + 1) * BLOCK_SIZE])), "a hit with other content"
        try:
            new = self.pool.allocate(-(-len(token_ids) // BLOCK_SIZE) - len(table))
        except OutOfBlocks:
            self.pool.free(table)
            return
        for i, block in enumerate(new, start=len(table)):
            self.content[block] = (salt, tuple(token_ids[: (i + 1) * BLOCK_SIZE]))
        self.cache.insert(token_ids, table + new, salt=salt)
        self.live.append((token_ids, table + new))

    @rule(data=st.data())
    def sequence_ends(self, data: st.DataObject) -> None:
        if self.live:
            _, table = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
            self.pool.free(table)

    @rule(data=st.data())
    def sequence_forks(self, data: st.DataObject) -> None:
        if self.live:
            token_ids, table = data.draw(st.sampled_from(self.live))
            self.pool.share(table)
            self.live.append((token_ids, list(table)))

    @invariant()
    def every_reference_is_somebodys(self) -> None:
        self.cache.check_invariants()
        for block in range(NUM_BLOCKS):
            assert self.pool.ref_count(block) == sum(table.count(block) for _, table in self.live)


Blocks.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBlocks = Blocks.TestCase
