"""The loops that shape steps by what is measured, in virtual time: step times, decode pressure, the ITL SLO."""

from __future__ import annotations

import random

import pytest

from engines.params import SamplingParams
from engines.scheduler import DecodeScheduler, PrefillScheduler
from engines.scheduler.control import StepControl
from engines.scheduler.itl_limits import MIN_CHUNK_TOKENS, ItlLimits
from engines.scheduler.pressure import MAX_RETRY_S, MIN_RETRY_S, MIN_SHARE, DecodePressure
from engines.scheduler.step_time import MIN_STEPS, StepTimeModel
from engines.sequence import Sequence
from kvstore.blocks import BlockPool

BLOCK_SIZE = 16


def prompt(rid: str, num_tokens: int, *, arrival_s: float = 0.0, max_tokens: int = 100) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(rid, 0, list(range(num_tokens)), params, 0, arrival_s=arrival_s, deadline_s=1e9)


def learned(fixed_s: float, per_token_s: float) -> StepTimeModel:
    model = StepTimeModel()
    for num_tokens in range(10, 10 + 40 * MIN_STEPS, 40):
        model.observe(num_tokens, fixed_s + per_token_s * num_tokens)
    return model


# ---------------------------------------------------------------- step times
def test_the_two_parts_of_a_step_are_found_through_noise() -> None:
    rng, model = random.Random(3), StepTimeModel()
    for _ in range(300):
        num_tokens = rng.choice([1, 8, 32, 300, 2000])
        elapsed_s = (0.010 + 0.0001 * num_tokens) * rng.uniform(0.9, 1.1)
        model.observe(num_tokens, elapsed_s * (20 if rng.random() < 0.01 else 1))  # a disturbed step now and then

    assert model.fixed_s == pytest.approx(0.010, rel=0.5)
    assert model.per_token_s == pytest.approx(0.0001, rel=0.15)


def test_steps_of_one_size_tell_nothing_of_the_slope() -> None:
    model = StepTimeModel()
    for _ in range(100):
        model.observe(8, 0.01)
    assert not model.is_known


def test_a_machine_that_became_slower_is_noticed() -> None:
    model = learned(0.01, 0.0001)
    for num_tokens in [10, 400, 900] * 100:
        model.observe(num_tokens, 0.02 + 0.0002 * num_tokens)
    assert model.expected_s(500) == pytest.approx(0.12, rel=0.02)


def test_utilization_is_the_rate_over_that_of_an_endless_step() -> None:
    model = learned(0.015, 0.0001)
    assert model.utilization(150) == pytest.approx(0.5, rel=0.01)
    assert model.utilization(850) == pytest.approx(0.85, rel=0.01)


def test_a_batch_starts_at_the_utilization_that_step_times_show() -> None:
    scheduler = PrefillScheduler(
        BlockPool(1000), None, BLOCK_SIZE, max_num_batched_tokens=8192, step_time=learned(0.015, 0.0001)
    )
    scheduler.add(prompt("a", 10))
    plan = scheduler.schedule(0.0)
    assert plan is not None
    scheduler.complete(plan, {("a", 0): [1]})

    scheduler.add(prompt("b", 800, arrival_s=0.001))
    assert scheduler.schedule(0.002) is None, "800 tokens use 0.84 of the device, and are a tenth of the limit"
    scheduler.add(prompt("c", 60, arrival_s=0.002))
    plan = scheduler.schedule(0.002)
    assert plan is not None
    assert plan.num_tokens == 860


# ---------------------------------------------------------------- decode pressure
def test_full_decode_workers_make_batches_small_and_are_asked_less_often() -> None:
    pressure = DecodePressure()
    now, waits = 0.0, []
    for _ in range(8):
        for _ in range(5):
            pressure.refused(now)  # one round: several requests were on their way
        waits.append(pressure.retry_at_s - now)
        now = pressure.retry_at_s

    assert waits[:4] == pytest.approx([MIN_RETRY_S, 2 * MIN_RETRY_S, 4 * MIN_RETRY_S, 8 * MIN_RETRY_S])
    assert waits[-1] == pytest.approx(MAX_RETRY_S)
    assert pressure.share == MIN_SHARE
    assert (pressure.of(32), pressure.of(4)) == (2, 1)


def test_room_on_decode_workers_lets_batches_grow_to_their_limit() -> None:
    pressure = DecodePressure()
    for i in range(5):
        pressure.refused(i)
    sizes = []
    for _ in range(20):
        pressure.granted()
        sizes.append(pressure.of(32))

    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (4, 32)
    pressure.refused(100.0)
    assert pressure.retry_at_s == pytest.approx(100.0 + MIN_RETRY_S)


def test_a_prefill_batch_has_the_size_that_the_pressure_leaves() -> None:
    pressure = DecodePressure()
    scheduler = PrefillScheduler(
        BlockPool(1000), None, BLOCK_SIZE, max_batch_size=8, max_num_batched_tokens=800, pressure=pressure
    )
    pressure.refused(0.0)
    pressure.refused(1.0)
    for i in range(20):
        scheduler.add(prompt(f"r{i}", 50, arrival_s=i * 1e-3))

    small = scheduler.schedule(5.0)
    for _ in range(16):
        pressure.granted()
    assert small is not None
    scheduler.complete(small, {item.sequence.seq_id: [1] for item in small.scheduled})
    large = scheduler.schedule(6.0)

    assert large is not None
    assert (len(small.scheduled), len(large.scheduled)) == (2, 8)


# ---------------------------------------------------------------- the ITL SLO
class Machine:
    """Runs the steps of a decode scheduler; a step takes what its tokens and its sequences cost."""

    def __init__(self, slo_ms: float, *, fixed_s: float, per_token_s: float, per_seq_s: float = 0.0) -> None:
        self.control = StepControl.of(itl_slo_ms=slo_ms, max_num_seqs=64, max_num_batched_tokens=2048)
        self.scheduler = DecodeScheduler(BlockPool(20_000), None, BLOCK_SIZE, limits=self.control.limits)
        self.now_s = 0.0
        self.mixed_s: list[float] = []
        self.decode_s: list[float] = []
        self.finished: list[str] = []
        self._costs = (fixed_s, per_token_s, per_seq_s)

    def step(self) -> None:
        plan = self.scheduler.schedule(self.now_s)
        if plan is None:
            self.now_s += 0.01
            return
        num_decoding = sum(item.num_new_tokens == 1 for item in plan.scheduled)
        fixed_s, per_token_s, per_seq_s = self._costs
        elapsed_s = fixed_s + per_token_s * plan.num_tokens + per_seq_s * num_decoding
        self.now_s += elapsed_s
        self.scheduler.complete(plan, {item.sequence.seq_id: [7] for item in plan.scheduled if item.samples})
        self.control.observe(plan, elapsed_s)
        if num_decoding:
            (self.decode_s if num_decoding == plan.num_tokens else self.mixed_s).append(elapsed_s)
        for item in plan.scheduled:
            sequence = item.sequence
            if len(sequence.output_token_ids) >= sequence.params.max_tokens:
                self.scheduler.remove(sequence.seq_id)
                self.finished.append(sequence.rid)


def test_prompt_chunks_beside_decode_rows_shrink_until_steps_keep_the_slo() -> None:
    machine = Machine(50.0, fixed_s=0.01, per_token_s=0.0001)
    for i in range(60):
        machine.scheduler.add(prompt(f"r{i}", 1000, arrival_s=i * 0.01, max_tokens=60))
    for _ in range(3000):
        machine.step()

    assert len(machine.finished) == 60
    settled = machine.mixed_s[len(machine.mixed_s) // 4 :]
    late = [elapsed_s for elapsed_s in settled if elapsed_s > 0.050]
    assert len(late) <= len(settled) * 0.05
    # Without the limit a chunk fills the step: 2048 tokens, 215 ms. With it, most of the SLO is used.
    assert sorted(settled)[len(settled) // 2] > 0.025


def test_as_many_sequences_decode_together_as_the_slo_allows() -> None:
    machine = Machine(50.0, fixed_s=0.01, per_token_s=0.0, per_seq_s=0.002)  # 20 sequences take 50 ms
    for i in range(400):
        machine.scheduler.add(prompt(f"r{i}", 2, arrival_s=i * 0.001, max_tokens=40))
    for _ in range(6000):
        machine.step()

    assert len(machine.finished) == 400
    settled = machine.decode_s[len(machine.decode_s) // 2 :]
    assert sum(elapsed_s > 0.0501 for elapsed_s in settled) <= len(settled) * 0.05
    assert machine.control.num_places >= 12


def test_an_slo_that_cannot_be_kept_starves_neither_prompts_nor_sequences() -> None:
    machine = Machine(1.0, fixed_s=0.02, per_token_s=0.0001)
    for i in range(6):
        machine.scheduler.add(prompt(f"r{i}", 300, arrival_s=i * 0.001, max_tokens=20))
    for _ in range(1500):
        machine.step()

    assert len(machine.finished) == 6
    assert machine.control.num_places >= 1


def test_decode_rows_never_wait_for_the_slo_and_a_lone_prompt_is_not_cut() -> None:
    limits = ItlLimits(slo_ms=5.0, step_time=learned(0.01, 0.0001), max_num_seqs=64, max_num_batched_tokens=2048)
    assert limits.max_num_tokens(0) == 2048
    assert limits.max_num_tokens(40) == 40 + MIN_CHUNK_TOKENS
    assert StepControl.of(itl_slo_ms=0.0, max_num_seqs=7, max_num_batched_tokens=100).limits is None
