from __future__ import annotations

import pytest

from kvstore.blocks import BlockPool, NotHeld, OutOfBlocks


def test_allocate_takes_all_or_nothing() -> None:
    pool = BlockPool(4)
    pool.allocate(3)
    with pytest.raises(OutOfBlocks) as caught:
        pool.allocate(2)
    assert (caught.value.needed, caught.value.free, caught.value.total) == (2, 1, 4)
    assert caught.value.retryable
    assert pool.num_free == 1


def test_a_shared_block_is_free_after_the_last_reference() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.share([block])
    pool.free([block])
    assert (pool.ref_count(block), pool.num_used) == (1, 1)
    pool.free([block])
    assert pool.num_free == 2
    pool.check_invariants()


def test_a_double_free_changes_nothing() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    with pytest.raises(NotHeld):
        pool.free([second, first, first])
    assert pool.num_used == 2


def test_a_blank_block_cannot_be_shared() -> None:
    with pytest.raises(NotHeld):
        BlockPool(3).share([1])


def test_an_id_outside_the_pool_is_refused() -> None:
    pool = BlockPool(3)
    for block in (-1, 3):
        with pytest.raises(NotHeld):
            pool.free([block])
