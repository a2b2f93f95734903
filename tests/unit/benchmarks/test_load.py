"""The planned load, in virtual time."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from benchmarks.errors import BadDistribution, BenchError
from benchmarks.load import Fixed, LoadSpec, LogNormal, Pacer, PlannedRequest, Uniform, parse_lengths, plan_load


class VirtualClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def at(*times_s: float) -> list[PlannedRequest]:
    return [PlannedRequest(k, at_s, 1, 1, k) for k, at_s in enumerate(times_s)]


def test_same_seed_gives_the_same_load() -> None:
    spec = LoadSpec(5.0, Uniform(1, 9), Fixed(3), num_requests=50, seed=7)

    assert plan_load(spec) == plan_load(spec)


def test_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    planned = plan_load(LoadSpec(10.0, Fixed(1), Fixed(1), num_requests=20_000))
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(planned)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))

    assert math.isclose(mean, 0.1, rel_tol=0.03)
    assert math.isclose(deviation, mean, rel_tol=0.03)


def test_duration_bounds_the_arrivals() -> None:
    planned = plan_load(LoadSpec(100.0, Fixed(1), Fixed(1), duration_s=2.0))

    assert 150 < len(planned) < 250
    assert planned[-1].at_s <= 2.0


def test_infinite_rate_sends_everything_at_once() -> None:
    assert {planned.at_s for planned in plan_load(LoadSpec(math.inf, Fixed(1), Fixed(1), num_requests=5))} == {0.0}


def test_load_needs_one_end() -> None:
    with pytest.raises(BenchError):
        plan_load(LoadSpec(1.0, Fixed(1), Fixed(1)))
    with pytest.raises(BenchError):
        plan_load(LoadSpec(1.0, Fixed(1), Fixed(1), num_requests=1, duration_s=1.0))


def test_lengths_are_read() -> None:
    assert parse_lengths("64") == Fixed(64)
    assert parse_lengths("uniform:16-256") == Uniform(16, 256)
    assert parse_lengths("lognormal:120,0.8,1024") == LogNormal(120.0, 0.8, 1024)
    assert parse_lengths("lognormal:100,1") == LogNormal(100.0, 1.0, 2000)


@pytest.mark.parametrize("text", ["0", "-3", "", "many", "uniform:9-1", "uniform:0-4", "lognormal:0,1"])
def test_lengths_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(BadDistribution, match="Expected N"):
        parse_lengths(text)


def test_sampled_lengths_stay_in_their_range() -> None:
    rng = random.Random(1)

    assert {Uniform(2, 4).sample(rng) for _ in range(200)} == {2, 3, 4}
    lengths = sorted(LogNormal(100, 1.5, 300).sample(rng) for _ in range(2001))
    assert lengths[0] >= 1
    assert lengths[-1] == 300
    assert 80 < lengths[1000] < 120


def test_pacer_hands_out_each_request_when_it_is_due() -> None:
    clock = VirtualClock()
    pacer = Pacer(at(0.5, 1.0, 1.25), clock)

    assert pacer.take_due() == []
    assert pacer.wait_s() == 0.5
    clock.now_s += 1.0
    assert [planned.idx for planned in pacer.take_due()] == [0, 1]
    assert pacer.wait_s() == 0.25
    clock.now_s += 5.0
    assert pacer.wait_s() == 0.0
    assert [planned.idx for planned in pacer.take_due()] == [2]
    assert pacer.wait_s() is None


def test_due_time_does_not_move_when_the_generator_is_late() -> None:
    clock = VirtualClock()
    pacer = Pacer(at(0.5), clock)
    clock.now_s += 9.0

    (planned,) = pacer.take_due()

    assert pacer.due_s(planned) == 100.5
