"""The load: when requests arrive and how long they are. Pure; everything follows from the seed.

Open loop: arrivals do not wait for answers, as users do not. A server that falls behind sees its queue grow, which a
closed loop would hide.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from benchmarks.errors import BadDistribution, BenchError

Number = TypeVar("Number", int, float)


class LengthDistribution(Protocol):
    """How many tokens a prompt or an output has."""

    def sample(self, rng: random.Random) -> int:
        """At least 1."""
        ...


@dataclass(frozen=True)
class Fixed:
    num_tokens: int

    def sample(self, rng: random.Random) -> int:  # noqa: ARG002 - the interface
        return self.num_tokens


@dataclass(frozen=True)
class Uniform:
    low: int
    high: int

    def sample(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True)
class LogNormal:
    """Most are short and a few are very long, as in chat logs."""

    median: float
    sigma: float
    max_tokens: int

    def sample(self, rng: random.Random) -> int:
        return max(1, min(self.max_tokens, round(rng.lognormvariate(math.log(self.median), self.sigma))))


def parse_lengths(text: str) -> LengthDistribution:
    """`128`, `uniform:16-256`, `lognormal:120,0.8` or `lognormal:120,0.8,1024`.

    Raises:
        BadDistribution: none of these, or not positive.
    """
    number = r"(\d+(?:\.\d+)?)"
    if re.fullmatch(r"\d+", text):
        return Fixed(_positive(text, int(text)))
    if match := re.fullmatch(r"uniform:(\d+)-(\d+)", text):
        low, high = int(match[1]), int(match[2])
        if high < low:
            raise BadDistribution(text, "the range is empty")
        return Uniform(_positive(text, low), high)
    if match := re.fullmatch(rf"lognormal:{number},{number}(?:,(\d+))?", text):
        median, sigma = float(match[1]), float(match[2])
        _positive(text, median)
        return LogNormal(median, sigma, int(match[3]) if match[3] else round(median * 20))
    raise BadDistribution(text, "not understood")


def _positive(text: str, value: Number) -> Number:
    if value <= 0:
        raise BadDistribution(text, "lengths are at least 1")
    return value


@dataclass(frozen=True)
class LoadSpec:
    """What to send. Exactly one of `num_requests` and `duration_s` is set."""

    rate_rps: float
    input_tokens: LengthDistribution
    output_tokens: LengthDistribution
    num_requests: int | None = None
    duration_s: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class PlannedRequest:
    """One request. `at_s` counts from the start of the run; `pick` seeds the choice of its words."""

    idx: int
    at_s: float
    num_input_tokens: int
    num_output_tokens: int
    pick: int


def plan_load(spec: LoadSpec) -> list[PlannedRequest]:
    """All requests of a run, in order of arrival.

    Raises:
        BenchError: no end is set, or two.
    """
    if (spec.num_requests is None) == (spec.duration_s is None):
        raise BenchError("give either a number of requests or a duration")
    rng = random.Random(spec.seed)
    planned: list[PlannedRequest] = []
    for at_s in arrivals(spec.rate_rps, rng):
        if len(planned) == spec.num_requests or (spec.duration_s is not None and at_s > spec.duration_s):
            return planned
        planned.append(
            PlannedRequest(
                len(planned), at_s, spec.input_tokens.sample(rng), spec.output_tokens.sample(rng), rng.getrandbits(48)
            )
        )
    raise AssertionError("arrivals never end")


def arrivals(rate_rps: float, rng: random.Random) -> Iterator[float]:
    """Arrival times of a Poisson process, in seconds; an infinite rate sends everything at once."""
    now_s = 0.0
    while True:
        if math.isfinite(rate_rps):
            now_s += rng.expovariate(rate_rps)
        yield now_s


class Pacer:
    """Hands out the planned requests when they are due. No I/O, no sleep.

    `clock` is monotonic seconds, so tests drive it in virtual time.
    """

    def __init__(self, planned: list[PlannedRequest], clock: Callable[[], float]) -> None:
        self._planned = planned
        self._next_idx = 0
        self._clock = clock
        self._start_s = clock()

    def wait_s(self) -> float | None:
        """Seconds until the next request is due (0 when late), None after the last."""
        if self._next_idx == len(self._planned):
            return None
        return max(0.0, self._planned[self._next_idx].at_s - self._elapsed_s())

    def take_due(self) -> list[PlannedRequest]:
        """Requests due by now, each handed out once."""
        due: list[PlannedRequest] = []
        while self._next_idx < len(self._planned):
            planned = self._planned[self._next_idx]
            if planned.at_s > self._elapsed_s():
                break
            due.append(planned)
            self._next_idx += 1
        return due

    def due_s(self, planned: PlannedRequest) -> float:
        """When a request is due, on the clock."""
        return self._start_s + planned.at_s

    def _elapsed_s(self) -> float:
        return self._clock() - self._start_s
