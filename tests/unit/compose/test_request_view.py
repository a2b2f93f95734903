"""`celeriac request`: what it prints of a record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compose.errors import ClusterNotRunning, UsageProblem
from compose.request_view import WIDTH, describe, read_request, request_table
from kvstore.state.phases import PHASES, DecodeSpans, PrefillSpans
from kvstore.state.records import Record, RequestBody
from kvstore.state.transitions import RequestState


def record(**changed: Any) -> Record:
    body = RequestBody(
        rid="abc-s00", model="tiny-chat", tenant="t", priority=0, seed=1, k=1, params=b"", prompt_ids=[1] * 60,
        gateway="g", meta=b"",
    )  # fmt: skip
    given: dict[str, Any] = {
        "rid": "abc-s00", "state": RequestState.FINISHED, "phase": "finished", "reason": "length", "epoch": 3,
        "owners": {}, "attempts": 1, "crash_attempts": 0, "deadline_ms": 0, "wake_n": 1, "n": [24], "fin": [True],
        "body": body, "stamps": {"queued": 1000.0, "claimed": 1010.0, "first_token": 1036.0, "finished": 1100.5},
        "prefill_spans": PrefillSpans(2, 20.0, 1035.0, 5.0),
        "decode_spans": DecodeSpans(3, 4.0, 6.0, 1038.0, 1048.0, 3.0),
    }  # fmt: skip
    return Record(**{**given, **changed})


def test_phases_stand_below_each_other_as_they_followed() -> None:
    lines = request_table(describe(record())).splitlines()

    assert lines[0] == "abc-s00: finished (length), 60 prompt tokens, 24 output tokens"
    assert [line.split()[0] for line in lines[1:-1]] == list(PHASES)
    bars = [line.split(" ms  ", 1)[1] for line in lines[1:-1]]
    begins = [len(bar) - len(bar.lstrip()) for bar in bars]
    assert begins == sorted(begins)
    assert max(len(bar) for bar in bars) == WIDTH
    assert lines[-1] == "  ttft 36.00 ms, handoff 7.00 ms, total 100.50 ms, the phases miss the total by 0.000 ms"


def test_request_under_way_shows_what_is_over() -> None:
    waiting = record(
        state=RequestState.QUEUED, reason="", n=[0], attempts=2, stamps={"queued": 1000.0}, prefill_spans=None,
        decode_spans=None,
    )  # fmt: skip

    assert request_table(describe(waiting)) == ("abc-s00: queued, 60 prompt tokens, 0 output tokens, claimed 2 times")


def test_what_is_no_id_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="no request id"):
        read_request(tmp_path, "../x")
    with pytest.raises(ClusterNotRunning):
        read_request(tmp_path, "cmpl-abc-s00")
