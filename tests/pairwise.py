"""Few cases that hold every pair of values of any two axes, where all combinations would take too long."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence


def all_cases(axes: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def pairwise_cases(axes: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Greedy: each case is the combination that has the most pairs which no case before it has. Deterministic."""
    every = all_cases(axes)
    missing = {pair for case in every for pair in pairs_of(case)}
    chosen = []
    while missing:
        best = max(every, key=lambda case: len(missing & pairs_of(case)))
        missing -= pairs_of(best)
        chosen.append(best)
    return chosen


def pairs_of(case: Mapping[str, str]) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    return set(itertools.combinations(sorted(case.items()), 2))
