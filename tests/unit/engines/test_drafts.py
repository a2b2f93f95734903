"""Guesses in the plans of a decode scheduler: only what nobody else wants, and nothing is left of wrong ones."""

from __future__ import annotations

import random

import pytest

from engines.params import SamplingParams
from engines.scheduler import DecodeScheduler, StepPlan
from engines.sequence import Sequence
from kvstore.blocks import BlockPool

BLOCK_SIZE = 4


class Guesses:
    """Always as many guesses as asked for, at most `num`."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.told: list[tuple[str, int, int]] = []

    def propose(self, sequence: Sequence, *, limit: int) -> list[int]:
        return [900 + i for i in range(min(limit, self.num))] if sequence.output_token_ids else []

    def observe(self, sequence: Sequence, *, num_drafted: int, num_kept: int) -> None:
        self.told.append((sequence.rid, num_drafted, num_kept))


def arrived(pool: BlockPool, rid: str, num_tokens: int, *, arrival_s: float = 0.0, num_spare: int = 0) -> Sequence:
    ids = list(range(num_tokens))
    sequence = Sequence(rid, 0, ids, SamplingParams(max_tokens=500), 0, arrival_s=arrival_s)
    sequence.block_table = pool.allocate(-(-num_tokens // BLOCK_SIZE) + num_spare)
    sequence.num_computed_tokens, sequence.output_token_ids = num_tokens, [1]
    return sequence


def make(num_blocks: int, guesses: Guesses, **limits: int) -> tuple[DecodeScheduler, BlockPool]:
    pool = BlockPool(num_blocks)
    return DecodeScheduler(pool, None, BLOCK_SIZE, proposer=guesses, **limits), pool


def plan_of(scheduler: DecodeScheduler) -> StepPlan:
    plan = scheduler.schedule(0.0)
    assert plan is not None
    return plan


def shape(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(item.sequence.rid, item.num_known_tokens, len(item.draft)) for item in plan.scheduled]


def test_kept_guesses_advance_a_sequence_and_wrong_ones_leave_nothing() -> None:
    guesses = Guesses(5)
    scheduler, pool = make(20, guesses)
    sequence = arrived(pool, "a", 7)
    scheduler.add(sequence)
    plan = plan_of(scheduler)
    (item,) = plan.scheduled
    assert (item.start, item.num_new_tokens, item.samples, plan.max_outputs) == (7, 6, True, 6)
    assert item.token_ids() == [1, 900, 901, 902, 903, 904]
    assert len(sequence.block_table) == 4  # for 13 tokens

    scheduler.complete(plan, {sequence.seq_id: [900, 901, 77]})

    assert sequence.output_token_ids == [1, 900, 901, 77]
    assert (sequence.num_computed_tokens, sequence.num_uncomputed_tokens) == (10, 1)
    assert (len(sequence.block_table), pool.num_free) == (3, 17)
    assert guesses.told == [("a", 5, 2)]


def test_guesses_take_no_block_below_the_watermark_and_none_from_others() -> None:
    guesses = Guesses(8)
    scheduler, pool = make(7, guesses, watermark_blocks=1)
    first, second = arrived(pool, "a", 7), arrived(pool, "b", 7)
    for sequence in (first, second):
        scheduler.add(sequence)

    plan = plan_of(scheduler)

    # Two blocks each, and 3 free: one must stay free, the first takes two, the second has room for its own token only.
    assert shape(plan) == [("a", 1, 8), ("b", 1, 0)]
    assert (pool.num_free, plan.preempted) == (1, ())


def test_blocks_that_a_sequence_had_before_its_guesses_stay_its_own() -> None:
    scheduler, pool = make(20, Guesses(2))
    sequence = arrived(pool, "a", 4, num_spare=2)
    scheduler.add(sequence)
    plan = plan_of(scheduler)
    scheduler.complete(plan, {sequence.seq_id: [5]})

    assert len(sequence.block_table) == 3


def test_guesses_get_what_prompts_leave_of_the_tokens() -> None:
    scheduler, pool = make(20, Guesses(8), max_num_batched_tokens=12)
    scheduler.add(arrived(pool, "a", 7))
    scheduler.add(Sequence("prompt", 0, list(range(9)), SamplingParams(), 0))

    assert shape(plan_of(scheduler)) == [("a", 1, 2), ("prompt", 9, 0)]


def test_wide_steps_have_no_guesses() -> None:
    scheduler, pool = make(40, Guesses(3), max_draft_seqs=2)
    for rid in "abc":
        scheduler.add(arrived(pool, rid, 7))
    assert shape(plan_of(scheduler)) == [("a", 1, 0), ("b", 1, 0), ("c", 1, 0)]

    scheduler.remove(("c", 0))
    assert shape(plan_of(scheduler)) == [("a", 1, 3), ("b", 1, 3)]


@pytest.mark.parametrize("seed", range(30))
def test_a_small_pool_preempts_where_plain_decoding_would_and_leaks_no_block(seed: int) -> None:
    """Twins with the same outputs: after as many tokens, each sequence owns as many blocks as without guesses."""
    rng = random.Random(seed)
    scheduler, pool = make(rng.randrange(10, 16), Guesses(6))
    live = [arrived(pool, f"r{i}", rng.randrange(1, 12), arrival_s=i) for i in range(3)]
    for sequence in live:
        scheduler.add(sequence)
    for _ in range(40):
        plan = scheduler.schedule(0.0)
        if plan is None:
            break
        needed = sum(-(-s.num_tokens // BLOCK_SIZE) for s in live)
        assert not plan.preempted or needed > pool.num_blocks
        live = [sequence for sequence in live if sequence not in plan.preempted]
        sampled = {item.sequence.seq_id: list(range(rng.randrange(len(item.draft) + 1) + 1)) for item in plan.scheduled}
        scheduler.complete(plan, sampled)
        for sequence in live:
            assert sequence.num_uncomputed_tokens == 1
            assert len(sequence.block_table) == -(-sequence.num_computed_tokens // BLOCK_SIZE)
        for sequence in [s for s in live if s.num_tokens > 30]:
            live.remove(sequence)
            scheduler.remove(sequence.seq_id)
            pool.free(sequence.block_table)
    assert pool.num_used == sum(len(sequence.block_table) for sequence in live)
