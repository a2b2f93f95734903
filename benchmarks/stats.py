"""Percentiles and intervals. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

NUM_RESAMPLES = 2000
MIN_ROUNDS = 10  # a bootstrap over fewer pairs understates the spread


@dataclass(frozen=True)
class Percentiles:
    """Of a sample; `num` is its size. All values are NaN for an empty sample."""

    p50: float
    p90: float
    p99: float
    mean: float
    num: int


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95 % interval, and what it should reach (None: no goal), or stay below (`at_most`).

    `num_rounds`: rounds that the interval rests on, None where it does not rest on rounds.
    """

    value: float
    low: float
    high: float
    goal: float | None = None
    at_most: bool = False
    num_rounds: int | None = None

    @property
    def verdict(self) -> str:
        """Whether the goal is met, or the interval is too wide to tell, or rests on too few rounds for a claim."""
        if self.goal is None:
            return ""
        if self.num_rounds is not None and self.num_rounds < MIN_ROUNDS:
            return "too few rounds"
        best, worst = (self.low, self.high) if self.at_most else (-self.high, -self.low)
        limit = self.goal if self.at_most else -self.goal
        if worst <= limit:
            return "reached"
        return "missed" if best > limit else "not resolvable here"


def percentile(values: Sequence[float], q: float) -> float:
    """Value below which a share `q` of the sample lies, interpolated linearly. NaN for an empty sample."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(values: Sequence[float]) -> Percentiles:
    mean = sum(values) / len(values) if values else math.nan
    return Percentiles(percentile(values, 0.5), percentile(values, 0.9), percentile(values, 0.99), mean, len(values))


def paired_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    goal: float | None = None,
    at_most: bool = False,
    seed: int = 0,
) -> Ratio:
    """Geometric mean of `numerators[i] / denominators[i]` with a 95 % bootstrap interval over the pairs.

    A pair is one round of interleaved runs, so drifts of the machine fall on both of its sides. Pairs with a value
    that is not positive and finite are left out; with none left everything is NaN.
    """
    logs = [
        math.log(a / b)
        for a, b in zip(numerators, denominators, strict=True)
        if math.isfinite(a) and math.isfinite(b) and a > 0 and b > 0
    ]
    if not logs:
        return Ratio(math.nan, math.nan, math.nan, goal, at_most, 0)
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(logs, k=len(logs))) / len(logs) for _ in range(NUM_RESAMPLES))
    low, high = percentile(means, 0.025), percentile(means, 0.975)
    return Ratio(math.exp(sum(logs) / len(logs)), math.exp(low), math.exp(high), goal, at_most, len(logs))
