"""Percentiles and intervals."""

from __future__ import annotations

import math

import numpy
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.stats import Ratio, paired_ratio, percentile, summarize

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(VALUES, st.floats(0, 1))
def test_percentile_equals_numpy(values: list[float], q: float) -> None:
    assert math.isclose(percentile(values, q), float(numpy.quantile(values, q)), rel_tol=1e-9, abs_tol=1e-6)


def test_summary_of_nothing_is_not_a_number() -> None:
    summary = summarize([])

    assert summary.num == 0
    assert math.isnan(summary.p99)
    assert math.isnan(summary.mean)


def test_equal_rounds_give_a_ratio_without_width() -> None:
    ratio = paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])

    assert math.isclose(ratio.value, 2) and math.isclose(ratio.low, 2) and math.isclose(ratio.high, 2)


def test_drift_of_the_machine_cancels_out_of_paired_rounds() -> None:
    drift = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5]
    noise = [1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 0.99, 1.0, 1.02, 0.98]

    ratio = paired_ratio([1.2 * d * n for d, n in zip(drift, noise, strict=True)], drift)

    assert 1.15 < ratio.low <= ratio.value <= ratio.high < 1.25


def test_rounds_without_a_usable_value_are_left_out() -> None:
    assert math.isclose(paired_ratio([2.0, math.nan, 0.0], [1.0, 1.0, 1.0]).value, 2)
    assert math.isnan(paired_ratio([0.0], [0.0]).value)


def test_same_seed_gives_the_same_interval() -> None:
    assert paired_ratio([1, 2, 3], [3, 2, 2]) == paired_ratio([1, 2, 3], [3, 2, 2])


def test_interval_around_the_goal_is_not_resolvable() -> None:
    assert Ratio(1.2, 1.1, 1.3, goal=1.2).verdict == "not resolvable here"
    assert Ratio(1.3, 1.25, 1.35, goal=1.2).verdict == "reached"
    assert Ratio(1.0, 0.9, 1.1, goal=1.2).verdict == "missed"
    assert Ratio(1.0, 0.9, 1.1).verdict == ""
