"""What a worker measures of the phases of its requests, in virtual time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from msgspec.structs import astuple
from pytest import approx

from engines import messages
from kvstore.state.phases import DecodeSpans
from tasks.front.spans import WRITE_AFTER_S
from tests.unit.tasks.front_rig import RID, Rig, claimed, handed

OFFSET_S = 5000.0  # the state server's clock minus this worker's


def known(rig: Rig) -> Rig:
    """A worker that has asked for the time once."""
    rig.store.answers["server_time_ms"] = (rig.clock() + OFFSET_S) * 1000
    rig.parts.spans.probe()
    return rig


def claimed_ago(rig: Rig, seconds: float) -> dict[str, Any]:
    at_ms = (rig.clock() + OFFSET_S - seconds) * 1000
    return {"claim": replace(claimed(), claimed_ms=at_ms)}


def written(rig: Rig) -> list[Any]:
    rig.turn(WRITE_AFTER_S)
    return rig.store.called("set_spans")


def test_prefill_worker_writes_reserve_and_prefill_of_what_it_handed_over() -> None:
    rig = known(Rig())
    rig.store.answers |= claimed_ago(rig, 0.002)
    rig.wake()

    rig.says(messages.Granted(RID, "x", "d0@h", 1))
    rig.clock.advance(0.2)
    rig.says(messages.Pushed(rid=RID, xfer="x", outcome="handed", granted_s=100.01, computed_s=100.15))

    ((rid, spans),) = written(rig)
    assert (rid, spans.epoch) == (RID, 2)
    assert (spans.reserve_ms, spans.prefill_ms) == (approx(12), approx(140))
    assert spans.computed_ms == approx((100.15 + OFFSET_S) * 1000)


def test_worker_that_does_not_know_the_servers_clock_writes_nothing() -> None:
    rig = Rig(claim=claimed())
    rig.wake()

    rig.says(messages.Pushed(rid=RID, xfer="x", outcome="handed", granted_s=100.01, computed_s=100.15))

    assert written(rig) == []


def test_push_that_failed_is_measured_by_nobody() -> None:
    rig = known(Rig(claim=claimed()))
    rig.wake()

    rig.says(messages.Pushed(rid=RID, xfer="x", outcome="failed", granted_s=100.01, computed_s=100.15))

    assert written(rig) == []


def test_worker_of_both_roles_writes_its_prefill_once_it_owns_the_decode() -> None:
    rig = known(Rig("both", handoff=handed()))
    rig.store.answers |= claimed_ago(rig, 0.003)
    rig.wake()

    rig.clock.advance(0.05)
    rig.tokens([300])

    ((rid, spans),) = written(rig)
    assert (rid, astuple(spans)) == (RID, (3, approx(53), approx((100.05 + OFFSET_S) * 1000), None))


def test_decode_worker_writes_what_came_before_the_end_of_the_first_step() -> None:
    rig = known(Rig("decode", handoff=handed()))
    rig.arrive()
    rig.clock.advance(0.02)

    rig.says(messages.Stepped(RID, 3, verified_s=100.0, began_s=100.004, ended_s=100.01, computed_s=99.998))

    at_ms = (100 + OFFSET_S) * 1000
    ((rid, spans),) = written(rig)
    assert (rid, type(spans)) == (RID, DecodeSpans)
    assert astuple(spans) == (3, approx(4), approx(6), approx(at_ms), approx(at_ms + 10), approx(2))


def test_transfer_between_two_hosts_is_left_to_the_servers_clock() -> None:
    rig = known(Rig("decode", handoff=handed()))
    rig.arrive()

    rig.says(messages.Stepped(RID, 3, verified_s=100.0, began_s=100.004, ended_s=100.01))

    ((_, spans),) = written(rig)
    assert spans.transfer_ms is None


def test_tokens_of_the_turn_are_published_before_the_spans_are_written() -> None:
    rig = known(Rig("decode", handoff=handed(1)))
    rig.arrive()
    rig.tokens([301], 1)
    rig.says(messages.Stepped(RID, 3, verified_s=100.0, began_s=100.004, ended_s=100.01, computed_s=99.998))

    rig.turn()
    assert len(rig.store.called("append_batch")) == 1
    assert rig.store.called("set_spans") == []

    assert len(written(rig)) == 1
