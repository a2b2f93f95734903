"""Continuous batching, in virtual time."""

from __future__ import annotations

import random

from engines.params import SamplingParams
from engines.scheduler import DecodeScheduler, StepPlan
from engines.scheduler.decode import MAX_PREEMPTIONS
from engines.sequence import Sequence
from kvstore.blocks import BlockPool

BLOCK_SIZE = 4


def make(rid: str, num_tokens: int, *, arrival_s: float = 0.0, choice: int = 0) -> Sequence:
    return Sequence(rid, choice, list(range(num_tokens)), SamplingParams(max_tokens=100), 0, arrival_s=arrival_s)


def arrived(pool: BlockPool, rid: str, num_tokens: int, *, arrival_s: float = 0.0, choice: int = 0) -> Sequence:
    """A sequence whose prompt was computed elsewhere, with its first token."""
    sequence = make(rid, num_tokens, arrival_s=arrival_s, choice=choice)
    sequence.block_table = pool.allocate(-(-num_tokens // BLOCK_SIZE))
    sequence.num_computed_tokens, sequence.output_token_ids = num_tokens, [1]
    return sequence


def make_scheduler(num_blocks: int, **limits: int) -> tuple[DecodeScheduler, BlockPool]:
    pool = BlockPool(num_blocks)
    return DecodeScheduler(pool, None, BLOCK_SIZE, **limits), pool


def step(scheduler: DecodeScheduler, now_s: float = 0.0) -> StepPlan:
    plan = scheduler.schedule(now_s)
    assert plan is not None
    scheduler.complete(plan, {item.sequence.seq_id: [7] for item in plan.scheduled if item.samples})
    return plan


def shape(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(item.sequence.rid, item.start, item.num_new_tokens) for item in plan.scheduled]


def test_arrived_sequence_joins_the_next_step() -> None:
    scheduler, pool = make_scheduler(10)
    scheduler.add(arrived(pool, "a", 5))
    step(scheduler)
    scheduler.add(arrived(pool, "b", 6))

    assert shape(step(scheduler)) == [("a", 6, 1), ("b", 6, 1)]


def test_decode_rows_go_first_and_a_prompt_gets_the_rest_in_chunks() -> None:
    scheduler, pool = make_scheduler(20, max_num_batched_tokens=6)
    scheduler.add(make("long", 9))
    scheduler.add(arrived(pool, "a", 3))

    assert shape(step(scheduler)) == [("a", 3, 1), ("long", 0, 5)]
    assert shape(step(scheduler)) == [("a", 4, 1), ("long", 5, 4)]
    assert shape(step(scheduler)) == [("a", 5, 1), ("long", 9, 1)]


def test_blocks_grow_with_the_tokens() -> None:
    scheduler, pool = make_scheduler(10)
    sequence = arrived(pool, "a", 4)
    scheduler.add(sequence)
    for _ in range(4):
        step(scheduler)
    assert len(sequence.block_table) == 2

    step(scheduler)

    assert len(sequence.block_table) == 3


def test_no_more_sequences_than_max_num_seqs_run() -> None:
    scheduler, _ = make_scheduler(100, max_num_seqs=2)
    for i in range(3):
        scheduler.add(make(f"r{i}", 3, arrival_s=float(i)))

    assert len(step(scheduler).scheduled) == 2
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_watermark_keeps_blocks_for_growth() -> None:
    scheduler, pool = make_scheduler(5, watermark_blocks=2)
    scheduler.add(arrived(pool, "a", 3))
    scheduler.add(make("b", 9))

    assert shape(step(scheduler)) == [("a", 3, 1)]
    assert scheduler.num_waiting == 1


def test_latest_arrived_gives_its_blocks_when_they_run_out() -> None:
    scheduler, pool = make_scheduler(4)
    early, late = arrived(pool, "early", 8), arrived(pool, "late", 7, arrival_s=1.0)
    scheduler.add(late)
    scheduler.add(early)

    plan = step(scheduler)

    assert plan.preempted == (late,)
    assert shape(plan) == [("early", 8, 1)]
    assert (late.block_table, late.num_computed_tokens, late.num_preemptions) == ([], 0, 1)
    assert (scheduler.num_running, scheduler.num_waiting, pool.num_free) == (1, 0, 1)


def test_choices_of_a_preempted_request_go_together() -> None:
    scheduler, pool = make_scheduler(6)
    early = arrived(pool, "early", 8)
    choices = [arrived(pool, "late", 7, arrival_s=1.0, choice=c) for c in (0, 1)]
    for sequence in (*choices, early):
        scheduler.add(sequence)

    plan = step(scheduler)

    assert set(plan.preempted) == set(choices)
    assert shape(plan) == [("early", 8, 1)]


def test_choices_with_the_worker_to_themselves_wait_for_each_other_and_all_end() -> None:
    scheduler, pool = make_scheduler(12)
    choices = [arrived(pool, "wide", 7, choice=c) for c in range(4)]
    for sequence in choices:
        scheduler.add(sequence)
    live = list(choices)

    for now in range(500):  # 4 choices of 30 tokens are 32 blocks, the pool has 12
        plan = scheduler.schedule(float(now))
        if plan is not None:
            assert plan.preempted == ()
            scheduler.complete(plan, {item.sequence.seq_id: [7] for item in plan.scheduled if item.samples})
        for sequence in [one for one in live if one.num_tokens >= 30]:
            scheduler.remove(sequence.seq_id)
            pool.free(sequence.block_table)
            live.remove(sequence)

    assert live == []
    assert pool.num_used == 0


def test_pinned_sequence_is_spared_while_another_can_give() -> None:
    scheduler, pool = make_scheduler(6)
    early, pinned = arrived(pool, "early", 8), arrived(pool, "pinned", 7, arrival_s=2.0)
    middle = arrived(pool, "middle", 7, arrival_s=1.0)
    pinned.num_preemptions = MAX_PREEMPTIONS
    for sequence in (early, middle, pinned):
        scheduler.add(sequence)

    plan = step(scheduler)

    assert plan.preempted == (middle,)
    assert {item.sequence for item in plan.scheduled} == {early, pinned}


def test_pinned_sequences_that_block_each_other_do_not_stop_for_ever() -> None:
    scheduler, pool = make_scheduler(4)
    sequences = [arrived(pool, rid, 8, arrival_s=i) for i, rid in enumerate("ab")]
    for sequence in sequences:
        sequence.num_preemptions = MAX_PREEMPTIONS
        scheduler.add(sequence)

    assert step(scheduler).preempted == (sequences[1],)
    assert shape(step(scheduler)) == [("a", 8, 1)]


def test_idle_scheduler_has_nothing_to_wake_up_for() -> None:
    scheduler, _ = make_scheduler(2)
    assert scheduler.schedule(0.0) is None
    assert scheduler.next_wakeup_s(0.0) is None
    scheduler.add(make("too-long", 100))

    assert scheduler.schedule(0.0) is None
    assert scheduler.next_wakeup_s(0.0) is None  # a busy loop would not free blocks


def test_random_load_loses_no_block_and_always_progresses() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        scheduler, pool = make_scheduler(24, max_num_seqs=6, max_num_batched_tokens=10, watermark_blocks=1)
        queue = [make(f"r{i}", rng.randrange(1, 30), arrival_s=float(i)) for i in range(12)]
        length = {sequence.rid: sequence.num_tokens + rng.randrange(1, 30) for sequence in queue}
        live: list[Sequence] = []
        num_done = 0
        for now in range(3000):
            if queue and rng.random() < 0.4:
                live.append(queue.pop())
                scheduler.add(live[-1])
            plan = scheduler.schedule(float(now))
            if plan is not None:
                assert plan.num_tokens <= 10
                assert len(plan.scheduled) <= 6
                for item in plan.scheduled:
                    assert len(item.sequence.block_table) * BLOCK_SIZE >= item.start + item.num_new_tokens
                    assert item.sequence not in plan.preempted
                scheduler.complete(plan, {item.sequence.seq_id: [7] for item in plan.scheduled if item.samples})
                for sequence in plan.preempted:
                    scheduler.add(sequence)  # as if it had come back through the queue
            for sequence in [s for s in live if s.num_tokens >= length[s.rid]]:
                scheduler.remove(sequence.seq_id)
                pool.free(sequence.block_table)
                live.remove(sequence)
                num_done += 1
            held = [block for sequence in live for block in sequence.block_table]
            assert len(held) == len(set(held)) == pool.num_used
            pool.check_invariants()
        assert num_done == 12, seed
