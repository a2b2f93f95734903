from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstore.blocks import BlockPool, PrefixCache

PROMPT = list(range(100, 112))  # three blocks of 4


def make(num_blocks: int = 8, policy: str = "lru") -> tuple[BlockPool, PrefixCache]:
    pool = BlockPool(num_blocks)
    return pool, PrefixCache(pool, 4, policy)


def cached(pool: BlockPool, cache: PrefixCache, token_ids: list[int], salt: str = "m") -> list[int]:
    """A sequence that was computed, is cached, and has ended."""
    table = pool.allocate(-(-len(token_ids) // 4))
    cache.insert(token_ids, table, salt=salt)
    pool.free(table)
    return table


def test_a_prefix_is_found_and_held() -> None:
    pool, cache = make()
    table = cached(pool, cache, PROMPT)
    found = cache.match([*PROMPT, 1, 2], salt="m")
    assert found == table
    assert [pool.ref_count(block) for block in found] == [1, 1, 1]
    assert (cache.stats.query_tokens, cache.stats.hit_tokens) == (14, 12)
    pool.free(found)
    cache.check_invariants()


def test_at_least_one_token_is_left_to_compute() -> None:
    pool, cache = make()
    cached(pool, cache, PROMPT)
    assert len(cache.match(PROMPT, salt="m")) == 2
    assert cache.match([], salt="m") == []


def test_a_partly_filled_block_is_never_found() -> None:
    pool, cache = make()
    cached(pool, cache, PROMPT[:7])
    assert len(cache.match(PROMPT, salt="m")) == 1


def test_equal_tokens_after_another_prefix_are_another_content() -> None:
    pool, cache = make()
    cached(pool, cache, PROMPT)
    assert cache.match([1, 2, 3, 4, *PROMPT[4:], 9], salt="m") == []


def test_tenants_do_not_see_each_other() -> None:
    pool, cache = make()
    cached(pool, cache, PROMPT, salt="model/a")
    assert cache.match([*PROMPT, 1], salt="model/b") == []


def test_allocate_evicts_the_tail_before_the_head() -> None:
    pool, cache = make(num_blocks=3)
    table = cached(pool, cache, PROMPT)
    assert (pool.num_free, pool.num_cached, cache.evictable) == (3, 3, 3)
    assert pool.allocate(1) == [table[2]]
    assert cache.match([*PROMPT, 1], salt="m") == table[:2]
    assert cache.stats.evicted_blocks == 1
    cache.check_invariants()


def test_a_hit_block_is_not_evicted_while_held() -> None:
    pool, cache = make(num_blocks=3)
    cached(pool, cache, PROMPT)
    found = cache.match(PROMPT[:5], salt="m")
    assert set(pool.allocate(2)).isdisjoint(found)
    assert pool.num_free == 0


@pytest.mark.parametrize(("policy", "kept"), [("lru", "old"), ("fifo", "new")])
def test_policy_chooses_between_age_and_use(policy: str, kept: str) -> None:
    pool, cache = make(num_blocks=2, policy=policy)
    old, new = [1, 2, 3, 4], [5, 6, 7, 8]
    cached(pool, cache, old)
    cached(pool, cache, new)
    pool.free(cache.match([*old, 0], salt="m"))  # used once more
    pool.allocate(1)
    assert bool(cache.match([*old, 0], salt="m")) == (kept == "old")
    assert bool(cache.match([*new, 0], salt="m")) == (kept == "new")


def test_a_content_keeps_its_first_block() -> None:
    pool, cache = make()
    first, second = pool.allocate(1), pool.allocate(1)
    cache.insert(PROMPT[:4], first, salt="m")
    cache.insert(PROMPT[:4], second, salt="m")
    pool.free(second)
    assert pool.num_cached == 0
    assert cache.match(PROMPT, salt="m") == first


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"kv\.eviction"):
        make(policy="random")


class Shelf:
    """Tiers that keep the number each block had."""

    def __init__(self, memory: dict[int, str]) -> None:
        self.memory = memory
        self.kept: dict[bytes, str] = {}

    def spill(self, key: bytes, block_id: int) -> None:
        self.kept[key] = self.memory[block_id]

    def restore(self, key: bytes, block_id: int) -> bool:
        if key not in self.kept:
            return False
        self.memory[block_id] = self.kept[key]
        return True

    def prefetch(self, keys: Iterator[bytes]) -> frozenset[bytes]:
        return frozenset(key for key in keys if key in self.kept)


def test_an_evicted_block_is_restored_into_a_block_of_its_own() -> None:
    memory: dict[int, str] = {}
    pool = BlockPool(3)
    cache = PrefixCache(pool, 4, tiers=Shelf(memory))
    table = cached(pool, cache, PROMPT)
    memory.update(zip(table, "abc", strict=True))
    pool.free(pool.allocate(3))  # evicts all three
    memory.update(dict.fromkeys(table, "overwritten"))
    assert cache.match([*PROMPT, 1], salt="m") == []
    assert len(cache.prefetch([*PROMPT, 1], salt="m")) == 3
    fresh = pool.allocate(3)
    assert cache.restore([*PROMPT, 1], fresh, 0, salt="m") == 3
    assert [memory[block] for block in fresh] == ["a", "b", "c"]
    assert cache.restore([*PROMPT, 1], fresh, 0, salt="another tenant") == 0
    assert cache.stats.restored_blocks == 3
