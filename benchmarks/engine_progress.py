"""Where a run of many rounds is, and how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Callable


class RoundClock:
    """Lines of progress for `num_rounds` rounds of `num_parts` parts, after a warm-up (round -1) that is as long, if
    there is one."""

    def __init__(
        self,
        what: str,
        *,
        num_rounds: int,
        num_parts: int,
        has_warm_up: bool = True,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._num_rounds = num_rounds
        self._num_parts = num_parts
        self._num_warm_up = int(has_warm_up)
        self._now_s = now_s
        self._started_s = now_s()

    def line(self, round_idx: int, part_idx: int, text: str) -> str:
        """To be called after each part. The estimate rests on the parts that are done."""
        done = (round_idx + self._num_warm_up) * self._num_parts + part_idx + 1
        left = (self._num_rounds + self._num_warm_up) * self._num_parts - done
        left_s = (self._now_s() - self._started_s) / done * left
        which = "warm-up" if round_idx < 0 else f"round {round_idx + 1} of {self._num_rounds}"
        return f"{self._what}, {which}, about {duration(left_s)} left, {text}"


def duration(seconds: float) -> str:
    """
    >>> duration(42.4), duration(600)
    ('42 s', '10 min')
    """
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
