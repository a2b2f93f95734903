"""What a bench row says of the server's phases."""

from __future__ import annotations

import math

from benchmarks.phases import handoff_minus_transfer_ms, off_ms, phase_lines, summarize_phases
from kvstore.state.phases import PHASES
from tests.unit.benchmarks.fake_server import TIMINGS_MS

WHOLE = {name: ms for name, ms in TIMINGS_MS.items() if ms is not None}


def test_names_are_those_of_the_server() -> None:
    from benchmarks import phases

    assert tuple(PHASES) == phases.PHASES


def test_sum_is_off_where_a_phase_has_a_gap() -> None:
    assert off_ms(WHOLE) == 0.25
    assert off_ms({**WHOLE, "decode_wait": 1.0}) == 3.25


def test_request_with_a_phase_missing_or_more_than_one_stay_says_nothing_of_the_stamps() -> None:
    assert off_ms({name: ms for name, ms in WHOLE.items() if name != "reserve"}) is None
    assert off_ms({name: ms for name, ms in WHOLE.items() if name != "closure"}) is None
    assert handoff_minus_transfer_ms({"queue": 1.0, "prefill": 2.0, "decode": 3.0, "total": 6.0}) is None


def test_row_without_handoffs_has_no_lines_of_them() -> None:
    row = summarize_phases([{"queue": 1.0, "prefill": 2.0, "decode": 3.0, "total": 6.0}])

    assert list(row) == ["phases_ms"]
    assert phase_lines(row) == []


def test_lines_tell_whether_the_goals_are_met() -> None:
    slow = {**WHOLE, "handoff": 13.5, "decode_wait": 11.5}

    good, bad = phase_lines(summarize_phases([WHOLE] * 3)), phase_lines(summarize_phases([slow] * 3))

    assert [line.rsplit(": ", 1)[1] for line in good] == ["reached", "reached"]
    assert [line.rsplit(": ", 1)[1] for line in bad] == ["missed", "missed"]
    assert "p50 11.50" in bad[0]


def test_percentiles_are_over_the_requests_that_were_handed_over() -> None:
    row = summarize_phases([WHOLE, {**WHOLE, "handoff": 8.0, "decode_wait": 6.0}, {"queue": 5.0}])

    assert row["handoff_minus_transfer_ms"]["num"] == 2
    assert math.isclose(row["handoff_minus_transfer_ms"]["p50"], 5.0)
    assert row["phases_ms"]["queue"]["num"] == 3
