"""The state server's clock as a worker knows it, in virtual time."""

from __future__ import annotations

import random

import pytest

from kvstore.state.server_clock import DRIFT, ServerClock

OFFSET_S = 1_700_000_000.0  # server minus ours


def note(clock: ServerClock, at_s: float, *, there_s: float, back_s: float, offset_s: float = OFFSET_S) -> None:
    """A call that takes `there_s` to the server and `back_s` home."""
    clock.note(sent_s=at_s, replied_s=at_s + there_s + back_s, server_ms=(at_s + there_s + offset_s) * 1000)


def error_s(clock: ServerClock, at_s: float, offset_s: float = OFFSET_S) -> float:
    told_ms = clock.server_ms(at_s)
    assert told_ms is not None
    return told_ms / 1000 - (at_s + offset_s)


def test_before_the_first_call_nothing_is_known() -> None:
    clock = ServerClock()

    assert clock.server_ms(1.0) is None
    assert clock.half_width_s == float("inf")
    assert clock.local_s(5.0, at_most_s=2.0) == 2.0


def test_slow_and_lopsided_calls_do_not_spoil_what_a_fast_one_told() -> None:
    clock = ServerClock()
    note(clock, 10.0, there_s=0.0001, back_s=0.0001)
    note(clock, 10.5, there_s=0.200, back_s=0.0001)
    note(clock, 11.0, there_s=0.0001, back_s=0.300)

    assert abs(error_s(clock, 11.3)) <= clock.half_width_s < 0.0003


def test_two_lopsided_calls_together_tell_more_than_either() -> None:
    clock = ServerClock()
    note(clock, 10.0, there_s=0.0001, back_s=0.020)
    note(clock, 10.1, there_s=0.020, back_s=0.0001)

    assert clock.half_width_s < 0.0003


def test_truth_stays_within_the_half_width_whatever_the_calls_and_the_drift() -> None:
    rng = random.Random(7)
    for _ in range(200):
        clock, rate, at_s = ServerClock(), rng.uniform(-DRIFT, DRIFT), 0.0
        for _ in range(40):
            at_s += rng.uniform(0.01, 2.0)
            offset_s = OFFSET_S + rate * at_s
            note(clock, at_s, there_s=rng.expovariate(200), back_s=rng.expovariate(200), offset_s=offset_s)
            # The server's clock is a double of seconds of the epoch: a quarter of a microsecond.
            assert abs(error_s(clock, at_s, offset_s)) <= clock.half_width_s + DRIFT * 0.1 + 1e-6


def test_clock_that_was_set_is_believed_at_once() -> None:
    clock = ServerClock()
    note(clock, 10.0, there_s=0.0001, back_s=0.0001)
    note(clock, 10.5, there_s=0.001, back_s=0.001, offset_s=OFFSET_S - 3.0)

    assert error_s(clock, 10.5, OFFSET_S - 3.0) == pytest.approx(0.0, abs=0.001)


def test_time_of_a_reply_is_never_after_the_reply() -> None:
    clock = ServerClock()
    note(clock, 10.0, there_s=0.001, back_s=0.001)

    assert clock.local_s((OFFSET_S + 12.0) * 1000, at_most_s=12.5) == pytest.approx(12.0, abs=0.001)
    assert clock.local_s((OFFSET_S + 12.0) * 1000, at_most_s=11.9) == 11.9
