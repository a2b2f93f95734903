"""What a decode step keeps from the step before: attention is told the same as if it had been told everything again."""

from __future__ import annotations

import random

import pytest
import torch

from engines.attention.backend import AttentionMetadata, AttentionRow
from engines.attention.native_backend import NativeAttention
from engines.ext.library import load_kernels
from engines.packed_batch import PackedBatch
from engines.params import SamplingParams
from engines.scheduler.plan import ScheduledSequence, StepPlan
from engines.step_rows import StepRows
from tests.unit.engines.engine_loop import make_sequence

BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 4, 2, 16


def attend(attention: NativeAttention, rows: list[AttentionRow], q: torch.Tensor) -> torch.Tensor:
    slots = [r.block_table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for r in rows for p in positions(r)]
    attention.begin_step(AttentionMetadata(tuple(rows), torch.tensor(slots)))
    return attention.forward(0, q)


def positions(row: AttentionRow) -> range:
    return range(row.start, row.start + row.num_new_tokens)


@pytest.mark.parametrize("seed", range(8))
def test_steps_of_growing_joining_and_leaving_sequences_attend_as_a_backend_that_remembers_nothing(seed: int) -> None:
    rng = random.Random(seed)
    kv = torch.randn(400, 1, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    kernels = load_kernels(torch.float32)
    attention = NativeAttention(kv, NUM_HEADS, kernels)
    free = rng.sample(range(400), 400)
    tables: dict[int, list[int]] = {}
    lengths: dict[int, int] = {}
    for step in range(80):
        if step % 20 == 0 or rng.random() < 0.1:
            tables[step], lengths[step] = [free.pop()], rng.randrange(1, BLOCK_SIZE)
        if len(tables) > 1 and rng.random() < 0.08:
            gone = rng.choice(list(tables))
            free += tables.pop(gone)
            del lengths[gone]
        if rng.random() < 0.1:  # moved to other blocks, as after a swap
            chosen = rng.choice(list(tables))
            tables[chosen] = [free.pop(0) for _ in tables[chosen]]
        rows = []
        for key, table in tables.items():
            num_new = rng.choice([1, 2]) if rng.random() < 0.02 else 1
            lengths[key] += num_new
            num_blocks = -(-lengths[key] // BLOCK_SIZE)
            if num_blocks > len(table):
                tables[key] = table + [free.pop() for _ in range(num_blocks - len(table))]
            rows.append(AttentionRow(lengths[key] - num_new, num_new, tables[key]))
        q = torch.randn(sum(row.num_new_tokens for row in rows), NUM_HEADS, HEAD_DIM)
        assert torch.equal(attend(attention, rows, q), attend(NativeAttention(kv, NUM_HEADS, kernels), rows, q))


def test_a_row_crosses_into_another_split_in_the_step_in_which_it_does() -> None:
    kv = torch.randn(300, 1, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    kernels = load_kernels(torch.float32)
    attention, table = NativeAttention(kv, NUM_HEADS, kernels), list(range(300))
    for start in range(508, 516):
        rows, q = [AttentionRow(start, 1, table)], torch.randn(1, NUM_HEADS, HEAD_DIM)
        assert torch.equal(attend(attention, rows, q), attend(NativeAttention(kv, NUM_HEADS, kernels), rows, q))


@pytest.mark.parametrize("seed", range(5))
def test_a_step_of_single_tokens_is_packed_token_by_token(seed: int) -> None:
    rng, items = random.Random(seed), []
    for i in range(20):
        sequence = make_sequence(f"r{i}", [rng.randrange(1000) for _ in range(rng.randrange(1, 30))])
        sequence.output_token_ids = [rng.randrange(1000) for _ in range(rng.randrange(5))]
        sequence.block_table = rng.sample(range(500), 10)
        items.append(ScheduledSequence(sequence, rng.randrange(sequence.num_tokens), 1))

    batch = PackedBatch.of(items, BLOCK_SIZE)

    for i, item in enumerate(items):
        block = item.sequence.block_table[item.start // BLOCK_SIZE]
        expected = (item.token_ids(), item.start, block * BLOCK_SIZE + item.start % BLOCK_SIZE)
        assert ([batch.ids[i]], batch.positions[i], batch.slots[i]) == expected


def test_a_row_is_made_once_and_follows_its_sequence() -> None:
    sequence = make_sequence("r", [1, 2, 3], SamplingParams(max_tokens=9, temperature=1.0, repetition_penalty=1.5))
    sequence.output_token_ids = [5]
    (first,) = StepRows.of(StepPlan(1, (ScheduledSequence(sequence, 3, 1),))).rows
    sequence.output_token_ids.append(7)
    (second,) = StepRows.of(StepPlan(2, (ScheduledSequence(sequence, 4, 1),))).rows

    assert second is first
    assert second.index == 2
    assert second.counts is not None
    ids, counts = second.counts.up_to_date()
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {1: 0, 2: 0, 3: 0, 5: 1, 7: 1}
