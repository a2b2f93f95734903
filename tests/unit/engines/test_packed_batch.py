"""A plan as arrays, against one token at a time."""

from __future__ import annotations

import random

import pytest

from engines.packed_batch import PackedBatch
from engines.scheduler.plan import ScheduledSequence
from tests.unit.engines.engine_loop import make_sequence


def random_items(rng: random.Random, block_size: int) -> list[ScheduledSequence]:
    items = []
    for i in range(rng.randrange(1, 12)):
        sequence = make_sequence(f"r{i}", [rng.randrange(1000) for _ in range(rng.randrange(1, 60))])
        sequence.output_token_ids = [rng.randrange(1000) for _ in range(rng.randrange(5))]
        sequence.block_table = rng.sample(range(500), -(-sequence.num_tokens // block_size) + rng.randrange(3))
        start = rng.randrange(sequence.num_tokens)
        items.append(ScheduledSequence(sequence, start, rng.randrange(1, sequence.num_tokens - start + 1)))
    return items


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_at_its_position_and_slot(seed: int) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 7, 32])
    items = random_items(rng, block_size)

    batch = PackedBatch.of(items, block_size)

    expected = [
        (
            item.sequence.token_slice(p, p + 1)[0],
            p,
            item.sequence.block_table[p // block_size] * block_size + p % block_size,
        )
        for item in items
        for p in range(item.start, item.start + item.num_new_tokens)
    ]
    found = zip(batch.ids.tolist(), batch.positions.tolist(), batch.slots.tolist(), strict=True)
    assert list(found) == expected


def test_a_sequence_without_a_block_for_its_token_is_refused() -> None:
    short, long = make_sequence("short", list(range(9))), make_sequence("long", list(range(9)))
    short.block_table, long.block_table = [3, 4], [5, 6, 7]

    with pytest.raises(IndexError, match="18 tokens in 6 blocks: 18 ids, 5 blocks"):
        PackedBatch.of([ScheduledSequence(short, 0, 9), ScheduledSequence(long, 0, 9)], 4)
