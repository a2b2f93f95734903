"""Fairness between tenants, and nobody starves, whatever the others send."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from engines.params import SamplingParams
from engines.scheduler import DecodeScheduler, PrefillScheduler
from engines.scheduler.fair_order import FairOrder
from engines.scheduler.policy import STARVATION_S
from engines.sequence import Sequence
from kvstore.blocks import BlockPool

BLOCK_SIZE = 16


def prompt(
    rid: str, tenant: str, *, num_tokens: int = 100, arrival_s: float = 0.0, priority: int = 0, deadline_s: float = 1e9
) -> Sequence:
    params = SamplingParams(max_tokens=1)
    ids = list(range(num_tokens))
    return Sequence(
        rid, 0, ids, params, 0, arrival_s=arrival_s, priority=priority, tenant=tenant, deadline_s=deadline_s
    )


def take(order: FairOrder, waiting: list[Sequence], num: int, *, now_s: float = 1.0) -> list[str]:
    taken = []
    for sequence in order.of(waiting, now_s):
        if len(taken) == num:
            break
        order.served(sequence, sequence.num_tokens)
        taken.append(sequence.rid)
    return taken


def test_a_flood_of_one_tenant_takes_turns_with_the_few_of_another() -> None:
    waiting = [prompt(f"a{i}", "a", arrival_s=i * 0.001) for i in range(50)]
    waiting += [prompt(f"b{i}", "b", arrival_s=0.5 + i * 0.001) for i in range(3)]

    assert take(FairOrder(), waiting, 6) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_shares_are_of_tokens_not_of_requests() -> None:
    waiting = [prompt(f"a{i}", "a", num_tokens=300, arrival_s=i * 0.01) for i in range(9)]
    waiting += [prompt(f"b{i}", "b", num_tokens=100, arrival_s=0.5 + i * 0.01) for i in range(9)]

    assert Counter(rid[0] for rid in take(FairOrder(), waiting, 8)) == {"a": 2, "b": 6}


def test_within_a_tenant_the_earliest_deadline_goes_first_and_priority_before_all() -> None:
    waiting = [
        prompt("late", "a", deadline_s=90.0),
        prompt("soon", "a", deadline_s=20.0, arrival_s=0.2),
        prompt("other", "b", deadline_s=99.0, arrival_s=0.3),
        prompt("first", "a", priority=-1, arrival_s=0.4),
    ]
    assert take(FairOrder(), waiting, 4) == ["first", "other", "soon", "late"]


def test_nobody_saves_up_a_claim_while_away() -> None:
    order = FairOrder()
    flood = [prompt(f"a{i}", "a", arrival_s=i * 0.001) for i in range(40)]
    for k in range(4):
        assert len(take(order, flood[5 * k :], 5)) == 5
    back = [prompt(f"b{i}", "b", arrival_s=0.9) for i in range(20)]

    assert take(order, flood[20:] + back, 6) == ["a20", "b0", "a21", "b1", "a22", "b2"]


def test_an_urgent_flood_passes_a_patient_request_only_until_it_is_overdue() -> None:
    patient = prompt("patient", "b", priority=9)
    urgent = [prompt(f"u{i}", "a", priority=-9, arrival_s=STARVATION_S + i * 0.001) for i in range(30)]

    assert "patient" not in take(FairOrder(), [patient, *urgent], 30, now_s=STARVATION_S - 0.1)
    assert take(FairOrder(), [patient, *urgent], 1, now_s=STARVATION_S + 0.1) == ["patient"]


def make_scheduler(kind: str) -> PrefillScheduler | DecodeScheduler:
    pool = BlockPool(10_000)
    if kind == "decode":
        return DecodeScheduler(pool, None, BLOCK_SIZE, max_num_batched_tokens=512, max_num_seqs=8)
    batching = "packed" if kind == "packed" else "bucketed"
    return PrefillScheduler(pool, None, BLOCK_SIZE, max_num_batched_tokens=512, max_batch_size=8, batching=batching)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["packed", "bucketed", "decode"])
@pytest.mark.parametrize("seed", range(8))
def test_every_prompt_is_computed_however_many_and_urgent_the_others_are(kind: str, seed: int) -> None:
    """Load above capacity for 30 s: a tenant that asks for little never waits longer than overdue and its turn."""
    rng, scheduler = random.Random(seed), make_scheduler(kind)
    now_s, number, waits, live = 0.0, 0, {}, {}
    while now_s < 30.0:
        for _ in range(rng.randrange(1, 5)):
            urgent = prompt(
                f"u{number}",
                rng.choice("abc"),
                num_tokens=rng.randrange(1, 900),
                arrival_s=now_s,
                priority=rng.randrange(-9, 3),
                deadline_s=now_s + rng.uniform(1, 60),
            )
            number += 1
            scheduler.add(urgent)
        if rng.random() < 0.05:
            modest = prompt(f"m{number}", "modest", num_tokens=rng.randrange(1, 900), arrival_s=now_s, priority=9)
            live[modest.rid] = modest
            number += 1
            scheduler.add(modest)
        now_s += 0.1
        plan = scheduler.schedule(now_s)
        if plan is None:
            continue
        scheduler.complete(plan, {item.sequence.seq_id: [7] for item in plan.scheduled if item.samples})
        for item in plan.scheduled:
            sequence = item.sequence
            if sequence.output_token_ids:
                scheduler.remove(sequence.seq_id)
                if live.pop(sequence.rid, None) is not None:
                    waits[sequence.rid] = now_s - sequence.arrival_s

    assert scheduler.num_waiting > 100, "the load is above the capacity"
    assert len(waits) > 5
    assert max(waits.values()) < STARVATION_S + 3.0
    assert all(now_s - sequence.arrival_s < STARVATION_S + 3.0 for sequence in live.values())
