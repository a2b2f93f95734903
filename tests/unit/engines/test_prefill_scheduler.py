"""Batches of prompts, in virtual time."""

from __future__ import annotations

import pytest

from engines.params import SamplingParams
from engines.scheduler import PrefillScheduler, StepPlan
from engines.scheduler.policy import STARVATION_S, order_key
from engines.sequence import Sequence
from kvstore.blocks import BlockPool, PrefixCache

BLOCK_SIZE = 16


def make(rid: str, num_tokens: int, *, arrival_s: float = 0.0, priority: int = 0, deadline_s: float = 1e9) -> Sequence:
    ids = [(sum(rid.encode()) + i) % 1000 for i in range(num_tokens)]
    return Sequence(rid, 0, ids, SamplingParams(), 0, arrival_s=arrival_s, priority=priority, deadline_s=deadline_s)


def make_scheduler(num_blocks: int = 1000, *, prefix_caching: bool = False, **settings: object) -> PrefillScheduler:
    pool = BlockPool(num_blocks)
    cache = PrefixCache(pool, BLOCK_SIZE) if prefix_caching else None
    return PrefillScheduler(pool, cache, BLOCK_SIZE, **settings)  # type: ignore[arg-type]


def rids(plan: StepPlan | None) -> list[str]:
    return [] if plan is None else [item.sequence.rid for item in plan.scheduled]


def finish(scheduler: PrefillScheduler, plan: StepPlan | None) -> None:
    assert plan is not None
    scheduler.complete(plan, {item.sequence.seq_id: [5] for item in plan.scheduled if item.samples})


def test_prompt_on_an_idle_worker_starts_at_once() -> None:
    scheduler = make_scheduler(batch_wait_ms=50.0)
    scheduler.add(make("a", 10, arrival_s=100.0))

    assert rids(scheduler.schedule(100.0)) == ["a"]


def test_on_a_busy_worker_a_batch_waits_for_company_but_not_too_long() -> None:
    scheduler = make_scheduler(batch_wait_ms=50.0)
    scheduler.add(make("a", 10))
    finish(scheduler, scheduler.schedule(0.0))
    scheduler.add(make("b", 10, arrival_s=0.010))
    scheduler.add(make("c", 10, arrival_s=0.020))

    assert scheduler.schedule(0.030) is None
    assert scheduler.next_wakeup_s(0.030) == pytest.approx(0.060)
    assert rids(scheduler.schedule(0.060)) == ["b", "c"]


def test_batch_that_reaches_the_target_utilization_starts_at_once() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=1000, target_utilization=0.85)
    scheduler.add(make("a", 10))
    finish(scheduler, scheduler.schedule(0.0))
    scheduler.add(make("b", 849, arrival_s=0.001))
    assert scheduler.schedule(0.002) is None

    scheduler.add(make("c", 1, arrival_s=0.002))

    assert rids(scheduler.schedule(0.002)) == ["b", "c"]


def test_long_prompt_goes_in_chunks_and_others_fill_the_rest() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=100)
    long, short = make("long", 250), make("short", 30, arrival_s=1.0)
    scheduler.add(long)
    scheduler.add(short)
    chunks = []
    for now in (2.0, 2.01, 2.02):
        plan = scheduler.schedule(now)
        assert plan is not None
        chunks.append([(item.sequence.rid, item.start, item.num_new_tokens) for item in plan.scheduled])
        finish(scheduler, plan)

    assert chunks == [[("long", 0, 100)], [("long", 100, 100)], [("long", 200, 50), ("short", 0, 30)]]
    assert (long.num_computed_tokens, long.output_token_ids) == (250, [5])
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.step_id) == (0, 0, 3)


def test_order_is_priority_then_deadline_then_arrival() -> None:
    scheduler = make_scheduler()
    for sequence in (
        make("late", 10, arrival_s=2.0),
        make("early", 10, arrival_s=1.0),
        make("urgent", 10, arrival_s=3.0, deadline_s=50.0),
        make("first", 10, arrival_s=4.0, priority=-1),
    ):
        scheduler.add(sequence)

    assert rids(scheduler.schedule(4.0)) == ["first", "urgent", "early", "late"]


def test_nobody_is_passed_over_for_ever() -> None:
    old, urgent = make("old", 10, arrival_s=0.0, priority=9), make("new", 10, arrival_s=STARVATION_S, priority=-9)

    assert order_key(urgent, STARVATION_S) < order_key(old, STARVATION_S)
    assert order_key(old, STARVATION_S + 0.1) < order_key(urgent, STARVATION_S + 0.1)


def test_prompt_takes_all_its_blocks_or_none_and_is_not_overtaken() -> None:
    scheduler = make_scheduler(num_blocks=10)
    big, small = make("big", 7 * BLOCK_SIZE), make("small", 1, arrival_s=1.0)
    first = make("first", 5 * BLOCK_SIZE, arrival_s=-1.0)
    for sequence in (first, big, small):
        scheduler.add(sequence)

    plan = scheduler.schedule(2.0)

    assert rids(plan) == ["first"]
    assert (len(first.block_table), big.block_table, small.block_table) == (5, [], [])
    finish(scheduler, plan)
    assert scheduler.schedule(3.0) is None
    assert scheduler.next_wakeup_s(3.0) is None  # freed blocks come with an event
    scheduler._blocks.take_back(first)
    assert rids(scheduler.schedule(4.0)) == ["big", "small"]


def test_cached_prefix_is_not_computed_again() -> None:
    scheduler = make_scheduler(prefix_caching=True)
    first, again = make("a", 100), make("a", 100, arrival_s=10.0)
    scheduler.add(first)
    finish(scheduler, scheduler.schedule(0.0))
    scheduler.add(again)

    plan = scheduler.schedule(10.0)

    assert plan is not None
    assert [(item.start, item.num_new_tokens) for item in plan.scheduled] == [(96, 4)]
    assert again.num_cached_tokens == 96
    assert again.block_table[:6] == first.block_table[:6]


def test_tenants_do_not_share_a_prefix() -> None:
    scheduler = make_scheduler(prefix_caching=True)
    first, other = make("a", 100), make("a", 100, arrival_s=10.0)
    other.tenant = "somebody else"
    scheduler.add(first)
    finish(scheduler, scheduler.schedule(0.0))
    scheduler.add(other)
    scheduler.schedule(10.0)

    assert other.num_cached_tokens == 0


def test_packing_saves_5000_of_12500_tokens_of_padding() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16_384)
    lengths = [500, 1000, 1500, 2000, 2500]
    for length in lengths:
        scheduler.add(make(f"r{length}", length))

    plan = scheduler.schedule(1.0)

    assert plan is not None
    assert plan.num_tokens == sum(lengths) == 7500
    assert plan.num_padding_tokens == 5000
    assert plan.num_tokens + plan.num_padding_tokens == 12_500


def test_buckets_leave_500_tokens_of_padding_where_one_batch_would_have_5000() -> None:
    scheduler = make_scheduler(batching="bucketed", max_num_batched_tokens=16_384, batch_wait_ms=0.0)
    for i, length in enumerate([500, 1000, 1500, 2000, 2500]):
        scheduler.add(make(f"r{length}", length, arrival_s=i * 0.1))
    padding = []
    for now in (1.0, 2.0, 3.0, 4.0):
        plan = scheduler.schedule(now)
        assert plan is not None
        padding.append(plan.num_padding_tokens)
        finish(scheduler, plan)

    assert (padding, scheduler.num_waiting) == ([0, 0, 500, 0], 0)


def test_bucketed_batches_hold_prompts_of_about_the_same_length() -> None:
    scheduler = make_scheduler(batching="bucketed", max_num_batched_tokens=16_384, batch_wait_ms=0.0)
    for i, length in enumerate([500, 1000, 400, 1900, 600]):
        scheduler.add(make(f"r{length}", length, arrival_s=i * 0.1))
    batches = []
    for now in (1.0, 2.0, 3.0):
        plan = scheduler.schedule(now)
        batches.append(rids(plan))
        finish(scheduler, plan)

    assert batches == [["r500", "r400"], ["r1000", "r600"], ["r1900"]]


def test_batch_size_limits_prompts_of_a_step() -> None:
    scheduler = make_scheduler(max_batch_size=2)
    for i in range(3):
        scheduler.add(make(f"r{i}", 10, arrival_s=float(i)))

    assert rids(scheduler.schedule(5.0)) == ["r0", "r1"]


def test_removed_sequence_keeps_its_blocks_for_the_caller() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=50)
    sequence = make("a", 100)
    scheduler.add(sequence)
    finish(scheduler, scheduler.schedule(0.0))

    scheduler.remove(sequence.seq_id)
    scheduler.remove(sequence.seq_id)

    assert len(sequence.block_table) == 7
    assert scheduler.schedule(1.0) is None


def test_choices_of_a_prompt_are_left_to_the_caller_to_fork() -> None:
    scheduler = make_scheduler()
    sequence = make("a", 10)
    sequence.num_samples = 2
    scheduler.add(sequence)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    scheduler.complete(plan, {sequence.seq_id: [5, 6]})

    assert (sequence.output_token_ids, sequence.num_computed_tokens) == ([], 10)
