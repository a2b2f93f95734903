"""The phases of a request out of the server's stamps and what the workers measured."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from kvstore.state.phases import (
    PHASES,
    DecodeSpans,
    PrefillSpans,
    closure_ms,
    decode_spans,
    encode_spans,
    phases_ms,
)

#            queue 10   reserve 5   prefill 20   transfer 3   decode_wait 4   first_step 6   decode 52
STAMPS = {"queued": 1000.0, "claimed": 1010.0, "handed": 1039.0, "first_token": 1036.0, "finished": 1100.0}
PREFILL = PrefillSpans(epoch=2, prefill_ms=20.0, computed_ms=1035.0, reserve_ms=5.0)
DECODE = DecodeSpans(
    epoch=3, decode_wait_ms=4.0, first_step_ms=6.0, verified_ms=1038.0, stepped_ms=1048.0, transfer_ms=3.0
)
WHOLE = dict(zip(PHASES, (10.0, 5.0, 20.0, 3.0, 4.0, 6.0, 52.0), strict=True))


def test_phases_follow_each_other_and_add_up_to_the_total() -> None:
    assert phases_ms(STAMPS, PREFILL, DECODE) == WHOLE
    assert list(phases_ms(STAMPS, PREFILL, DECODE)) == list(PHASES)
    assert closure_ms(STAMPS, PREFILL, DECODE) == pytest.approx(0.0)


@pytest.mark.parametrize("span", ["reserve_ms", "prefill_ms"])
def test_time_that_a_prefill_worker_leaves_out_shows_in_the_closure(span: str) -> None:
    spans = replace(PREFILL, **{span: getattr(PREFILL, span) - 2.5})

    assert closure_ms(STAMPS, spans, DECODE) == pytest.approx(-2.5)


@pytest.mark.parametrize("span", ["transfer_ms", "decode_wait_ms", "first_step_ms", "stepped_ms"])
def test_time_that_a_decode_worker_counts_twice_or_not_shows_in_the_closure(span: str) -> None:
    spans = replace(DECODE, **{span: getattr(DECODE, span) - 2.5})

    assert abs(closure_ms(STAMPS, PREFILL, spans) or 0.0) == pytest.approx(2.5)


def test_between_two_hosts_the_servers_clock_tells_the_transfer() -> None:
    apart = replace(DECODE, transfer_ms=None, verified_ms=1039.5)

    assert phases_ms(STAMPS, PREFILL, apart)["transfer"] == 4.5


def test_request_under_way_shows_the_phases_that_are_over() -> None:
    begun = {"queued": 1000.0, "claimed": 1010.0}

    assert phases_ms({"queued": 1000.0}, None, None) == {}
    assert phases_ms(begun, None, None) == {"queue": 10.0}
    assert list(phases_ms(begun, PREFILL, None)) == ["queue", "reserve", "prefill"]
    assert list(phases_ms(begun, PREFILL, DECODE)) == [name for name in PHASES if name != "decode"]
    assert closure_ms(begun, PREFILL, DECODE) is None


def test_worker_that_decodes_its_own_prompts_has_no_transfer() -> None:
    own = PrefillSpans(epoch=3, prefill_ms=25.0, computed_ms=1035.0)

    assert phases_ms(STAMPS, own, None) == {"queue": 10.0, "prefill": 25.0, "decode": 65.0}
    assert closure_ms(STAMPS, own, None) is None


def test_decode_of_a_stay_before_the_last_claim_is_left_out() -> None:
    again = PrefillSpans(epoch=5, prefill_ms=20.0, computed_ms=1035.0, reserve_ms=5.0)

    assert list(phases_ms(STAMPS, again, DECODE)) == ["queue", "reserve", "prefill"]
    assert closure_ms(STAMPS, again, DECODE) is None


def test_request_that_moved_between_decode_workers_has_no_closure() -> None:
    moved = replace(DECODE, epoch=4)

    assert closure_ms(STAMPS, PREFILL, moved) is None


def test_spans_survive_the_record_and_damaged_ones_are_none() -> None:
    assert decode_spans({"prefill": encode_spans(PREFILL), "decode": encode_spans(DECODE)}) == (PREFILL, DECODE)
    assert decode_spans({"prefill": b"\xc1", "decode": encode_spans([1])}) == (None, None)
    assert decode_spans({}) == (None, None)
