"""Many requests in one turn: they share round trips to the state server, and each keeps its own fate. Virtual time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from engines import messages
from engines.params import SamplingParams
from kvstore.errors import BadRecord
from kvstore.state.replies import Final, Gone, Released, Stale, Turn
from kvstore.state.transitions import RequestState
from tasks.front.claims import CLAIMS_AT_ONCE
from tasks.front.spans import WRITE_AFTER_S
from tests.fakes import RecordingJob
from tests.unit.tasks.front_rig import NO_ANSWER, Rig, beat, claimed, handed

RIDS = [f"r{i}-s00" for i in range(8)]


def arrived(rid: str, *, epoch: int = 2, xfer: str = "") -> messages.Arrived:
    return messages.Arrived(
        rid=rid, xfer=xfer or f"x-{rid}", epoch=epoch, from_token="p.1", prompt_ids=[1, 2], choices=[[300]],
        params=SamplingParams(max_tokens=8), seed=1, deadline_s=60.0, num_bytes=1, transfer_s=0.0,
    )  # fmt: skip


def by_rid(answers: dict[str, Any], otherwise: Any) -> Any:
    """An answer of the store that depends on the request; an error is raised."""

    def answer(rid: str, *_: Any) -> Any:
        reply = answers.get(rid, otherwise)
        if isinstance(reply, Exception):
            raise reply
        return reply

    return answer


# ---------------------------------------------------------------- hand-offs
def test_a_burst_of_arrivals_is_handed_over_in_one_round_trip_and_in_order() -> None:
    rig = Rig("decode", handoff=handed(n=1))

    rig.says(*map(arrived, RIDS))

    assert rig.store.round_trips == [("handoff", len(RIDS))]
    assert [args[0] for args in rig.store.called("handoff")] == RIDS
    promoted = rig.heard()
    assert [(type(p), p.rid) for p in promoted] == [(messages.Promote, rid) for rid in RIDS]
    assert [p.token for p in promoted] == [args[3] for args in rig.store.called("handoff")]
    assert len({p.token for p in promoted}) == len(RIDS)


def test_a_lone_arrival_waits_for_no_company() -> None:
    rig = Rig("decode", handoff=handed(n=1))

    rig.says(arrived(RIDS[0]))
    rig.says(arrived(RIDS[1]))

    assert rig.store.round_trips == [("handoff", 1), ("handoff", 1)]


def test_requests_that_were_refused_leave_the_others_of_their_burst_alone() -> None:
    refusals = {
        RIDS[1]: Stale(7, RequestState.DECODING),
        RIDS[3]: Final(RequestState.CANCELLED),
        RIDS[4]: Gone(),
        RIDS[6]: BadRecord(rid=RIDS[6], why="garbled"),
    }
    rig = Rig("decode", handoff=by_rid(refusals, handed(n=1)))

    rig.says(*map(arrived, RIDS))

    told = rig.heard()
    assert [m.rid for m in told if isinstance(m, messages.Promote)] == [r for r in RIDS if r not in refusals]
    assert {(m.rid, m.xfer) for m in told if isinstance(m, messages.Drop)} == {(r, f"x-{r}") for r in refusals}
    assert set(rig.parts.ctx.live) == set(RIDS) - set(refusals)


def test_a_lost_reply_repeats_the_whole_burst_and_hands_nothing_over_twice() -> None:
    rig = Rig("decode", handoff=NO_ANSWER)
    rig.says(*map(arrived, RIDS))
    assert rig.heard() == []
    rig.store.answers["handoff"] = handed(n=1)
    rig.store.calls.clear()

    rig.says(arrived("late-s00"))  # goes with the repeat
    rig.turn(0.2)

    assert rig.store.round_trips == [("handoff", len(RIDS)), ("handoff", len(RIDS) + 1)]
    assert Counter(m.rid for m in rig.heard()) == Counter([*RIDS, "late-s00"])
    rig.turn(1.0)
    assert len(rig.store.called("handoff")) == len(RIDS) + 1


def test_a_repeated_burst_keeps_its_tokens() -> None:
    sent: list[tuple[Any, ...]] = []

    def no_answer_to_the_last(*args: Any) -> Any:
        sent.append(args)
        if args[0] == RIDS[-1] and len(sent) == len(RIDS):
            raise NO_ANSWER
        return handed(n=1)

    rig = Rig("decode", handoff=no_answer_to_the_last)
    rig.says(*map(arrived, RIDS))
    assert rig.parts.ctx.live == {}, "all of them wait: any may have been handed over"

    rig.turn(0.2)

    assert sent[: len(RIDS)] == sent[len(RIDS) :]
    assert list(rig.parts.ctx.live) == RIDS


def test_two_arrivals_of_one_request_are_asked_for_one_after_the_other() -> None:
    replies = iter([handed(n=1), Stale(3, RequestState.DECODING)])
    rig = Rig("decode", handoff=lambda *_: next(replies))

    rig.says(arrived(RIDS[0], xfer="x1"), arrived(RIDS[0], xfer="x2"))

    assert rig.store.round_trips == [("handoff", 1), ("handoff", 1)]
    told = rig.heard()
    assert [(type(m), m.xfer) for m in told] == [(messages.Promote, "x1"), (messages.Drop, "x2")]


def test_of_two_arrivals_that_the_record_both_takes_none_is_decoded_and_it_goes_back() -> None:
    """A failover lost the first hand-off: the second, of a newer epoch, is adopted. The engine knows one by the id."""
    replies = iter([handed(n=1, epoch=3), handed(n=1, epoch=6)])
    turns = [Turn(RIDS[0], 9)]
    rig = Rig("decode", handoff=lambda *_: next(replies), release=Released(RequestState.QUEUED, turns))

    rig.says(arrived(RIDS[0], epoch=2, xfer="x1"), arrived(RIDS[0], epoch=5, xfer="x2"))

    assert rig.parts.ctx.live == {}
    assert messages.Drop(RIDS[0]) in rig.heard()
    ((rid, epoch, token),) = rig.store.called("release")
    assert (rid, epoch, token) == (RIDS[0], 6, rig.store.called("handoff")[1][3])
    assert rig.hub.turns == turns


def test_first_tokens_of_many_local_requests_are_handed_over_together() -> None:
    rig = Rig("both", claim=claimed(), handoff=handed(n=0))
    for rid in RIDS[:4]:
        rig.wake(rid)
    rig.heard()

    outs = [messages.TokenOut(rid, 0, 0, [300], None, "", epoch=2) for rid in RIDS[:4]]
    rig.says(messages.Tokens(1, outs))

    assert rig.store.round_trips[-1] == ("handoff", 4)
    assert [m.rid for m in rig.heard() if isinstance(m, messages.Owner)] == RIDS[:4]


# ---------------------------------------------------------------- claims
def submitted(rig: Rig, rids: list[str]) -> dict[str, Any]:
    """Wake-ups that come in one turn."""
    rig.parts.peers.refresh([])  # nobody to hand to: they stay in hand
    jobs = {rid: rig.wake(rid) for rid in rids}
    rig.parts.peers.refresh([beat()])
    rig.turn()
    return jobs


def test_wake_ups_that_there_is_room_for_are_claimed_in_one_round_trip() -> None:
    rig = Rig(claim=claimed())

    jobs = submitted(rig, RIDS)

    room = rig.parts.ctx.settings.prefill.max_batch_size
    assert rig.store.round_trips == [("claim", room)]
    assert [m.rid for m in rig.heard()] == RIDS[:room]
    assert [rid for rid, job in jobs.items() if job.words == ["accept"]] == RIDS[:room]


def test_a_burst_of_claims_looks_at_its_room_again_after_some() -> None:
    """Requests of four choices each: the first eight fill what looked like room for many."""
    rig = Rig("both", claim=claimed(k=4))
    rig.parts.ctx.num_slots = 40
    rids = [f"r{i}-s00" for i in range(40)]

    for rid in rids:
        rig.parts.submit(RecordingJob(rid, "prefill"))
    rig.turn()

    sizes = [size for _, size in rig.store.round_trips]
    assert sizes == [CLAIMS_AT_ONCE, CLAIMS_AT_ONCE]
    assert len(rig.parts.claims.hands) == len(rids) - sum(sizes)


def test_a_request_that_cannot_be_claimed_leaves_the_others_alone() -> None:
    answers = {RIDS[0]: Gone(), RIDS[1]: BadRecord(rid=RIDS[1], why="garbled")}
    rig = Rig(claim=by_rid(answers, claimed()))

    jobs = submitted(rig, RIDS[:4])

    assert [jobs[rid].words for rid in RIDS[:4]] == [["succeed"], ["fail"], ["accept"], ["accept"]]
    assert [m.rid for m in rig.heard()] == RIDS[2:4]


def suspects(*rids: str, n: int = 0) -> Any:
    return by_rid({rid: claimed(crash_attempts=2, n=n) for rid in rids}, claimed())


@pytest.mark.parametrize("n", [0, 1])
def test_what_is_claimed_with_a_suspect_goes_back_before_it_starts(n: int) -> None:
    rig = Rig(claim=suspects(RIDS[0], RIDS[2], n=n), read_ids=[[300]], release=None)

    jobs = submitted(rig, RIDS[:4])

    assert [call[0] for call in rig.store.called("release")] == RIDS[1:4]
    assert [jobs[rid].words for rid in RIDS[:4]] == [["accept"], ["retry"], ["retry"], ["retry"]]
    assert [m.rid for m in rig.heard()] == [RIDS[0]]


def test_among_suspects_claims_are_made_one_by_one() -> None:
    rig = Rig(claim=suspects(*RIDS), release=None)
    submitted(rig, RIDS[:6])  # room for four: one stays, three go back, two are in hand
    assert rig.store.round_trips == [("claim", 4)]

    rig.says(messages.Pushed(rid=RIDS[0], xfer="x", outcome="handed"))
    rig.turn()
    rig.turn()

    assert rig.store.round_trips == [("claim", 4), ("claim", 1)]
    assert len(rig.store.called("release")) == 3


def test_a_suspect_that_is_not_the_first_waits_for_those_before_it() -> None:
    rig = Rig(claim=suspects(RIDS[1]), release=None)

    submitted(rig, RIDS[:3])

    assert [m.rid for m in rig.heard()] == [RIDS[0]]
    rig.says(messages.Pushed(rid=RIDS[0], xfer="x", outcome="handed"))
    rig.turn()
    assert [m.rid for m in rig.heard() if isinstance(m, messages.Add)] == [RIDS[1]]


# ---------------------------------------------------------------- figures
def test_the_measured_phases_of_a_burst_are_written_in_one_round_trip() -> None:
    rig = Rig("decode", handoff=handed(n=1))
    rig.store.answers["server_time_ms"] = rig.clock() * 1000
    rig.parts.spans.probe()
    rig.says(*map(arrived, RIDS))

    rig.says(*(messages.Stepped(rid, 3, verified_s=100.0, began_s=100.0, ended_s=100.01) for rid in RIDS))
    rig.turn(WRITE_AFTER_S)

    assert rig.store.round_trips[-1] == ("set_spans", len(RIDS))
    assert [args[0] for args in rig.store.called("set_spans")] == RIDS


def test_claims_of_an_engine_that_died_meanwhile_all_go_back() -> None:
    rig = Rig(claim=NO_ANSWER, release=None, evict=None)
    submitted(rig, RIDS[:3])
    rig.parts.ctx.identity.renew()
    rig.store.answers["claim"] = claimed()

    rig.turn(0.2)

    assert [call[0] for call in rig.store.called("release")] == RIDS[:3]
    assert rig.parts.ctx.live == {}
