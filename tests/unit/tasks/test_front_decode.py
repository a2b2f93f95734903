"""The decode side of the output thread: arrivals, their Celery tasks, the fence."""

from __future__ import annotations

import msgspec

from engines import messages
from kvstore.state.entries import FinEntry
from kvstore.state.replies import Final, Stale
from kvstore.state.transitions import RequestState
from tests.unit.tasks.front_rig import NO_ANSWER, RID, Rig, handed


def test_an_arrival_is_handed_over_and_promoted_under_its_own_token() -> None:
    rig = Rig("decode", handoff=handed(n=1))

    rig.arrive()

    rid, epoch, from_token, token = rig.store.called("handoff")[0]
    assert (rid, epoch, from_token) == (RID, 2, "p.1")
    assert rig.heard() == [messages.Promote(RID, "x1", 3, token)]
    rig.turn()
    assert rig.appended == [], "the log has the first token already"


def test_the_decode_worker_publishes_what_the_prefill_worker_could_not() -> None:
    rig = Rig("decode", handoff=handed(n=0))

    rig.arrive()
    rig.turn()

    assert [(item.index, item.count, item.epoch) for item in rig.appended] == [(0, 1, 3)]


def test_an_arrival_that_another_won_is_refused() -> None:
    rig = Rig("decode", handoff=Stale(3, RequestState.DECODING))
    job = rig.wake(stage="decode")

    rig.arrive()

    assert rig.heard() == [messages.Drop(RID, "x1")]
    assert job.words == ["retry"]


def test_a_handoff_without_an_answer_is_repeated() -> None:
    rig = Rig("decode", handoff=NO_ANSWER)
    rig.arrive()
    rig.store.answers["handoff"] = handed()

    rig.turn(0.2)

    assert len(set(rig.store.called("handoff"))) == 1
    assert len(rig.store.called("handoff")) == 2
    assert RID in rig.parts.ctx.live


def test_a_decode_task_before_its_arrival_starts_with_the_handoff() -> None:
    rig = Rig("decode", handoff=handed())
    rig.says(messages.Incoming(RID, "x1"))
    job = rig.wake(stage="decode")
    assert job.words == []

    rig.arrive()

    assert job.words == ["accept"]


def test_a_decode_task_that_comes_after_the_end_shows_the_true_times() -> None:
    rig = Rig("decode", handoff=handed())
    started_s = rig.clock()
    rig.arrive()
    rig.clock.advance(1.0)
    rig.tokens([301], 1, finish="length")
    rig.turn()

    job = rig.wake(stage="decode")

    assert job.told == [("accept", started_s), ("succeed", "finished")]


def test_a_decode_task_without_an_arrival_is_acked_after_two_seconds() -> None:
    rig = Rig("decode")
    job = rig.wake(stage="decode")

    rig.turn(1.9)
    assert job.words == []
    rig.turn(0.2)

    assert job.words == ["succeed"]


def test_a_lost_arrival_lets_its_task_go() -> None:
    rig = Rig("decode")
    rig.says(messages.Incoming(RID, "x1"))
    job = rig.wake(stage="decode")

    rig.says(messages.ArrivalLost(RID, "x1"))

    assert job.words == ["succeed"]


def test_a_stop_string_ends_the_choice_and_the_engine_is_told() -> None:
    rig = Rig("decode", handoff=handed())
    tokenizer = rig.parts.ctx.tokenizer
    word = tokenizer.decode([301], skip_special_tokens=True)
    rig.arrive(stop=(word,))
    rig.heard()

    rig.tokens([301], 1)
    rig.turn()

    assert messages.Stop(RID, 0) in rig.heard()
    fin = msgspec.msgpack.decode(rig.appended[-1].fin, type=FinEntry)
    assert (fin.reason, fin.stop_reason) == ("stop", word)


def test_a_worker_that_cannot_renew_publishes_nothing_and_asks_first_when_it_can() -> None:
    rig = Rig("decode", handoff=handed())
    rig.arrive()
    rig.turn()
    rig.store.answers["renew"] = NO_ANSWER
    for _ in range(8):
        rig.turn(0.25)
    rig.tokens([301], 1)
    num_items = len(rig.appended)
    rig.turn(0.25)
    assert len(rig.appended) == num_items
    assert RID in rig.parts.ctx.live, "suspended, its KV is kept"

    rig.store.answers["renew"] = []
    rig.turn(0.25)

    assert rig.appended[-1].index == 1


def test_a_paused_process_hears_of_a_takeover_before_it_publishes() -> None:
    rig = Rig("decode", handoff=handed())
    rig.arrive()
    rig.turn()
    num_items = len(rig.appended)
    rig.store.answers["renew"] = lambda items: [(items[0], Stale(9, RequestState.DECODING))]
    rig.tokens([301], 1)

    rig.turn(5.0)

    assert len(rig.appended) == num_items
    assert rig.parts.ctx.live == {}


def test_after_thirty_seconds_without_an_answer_the_kv_is_dropped() -> None:
    rig = Rig("decode", handoff=handed(), renew=NO_ANSWER)
    rig.arrive()

    for _ in range(62):
        rig.turn(0.5)

    assert rig.parts.ctx.live == {}
    assert messages.Drop(RID) in rig.heard()


def test_a_cancelled_request_is_dropped_with_the_next_renewal() -> None:
    rig = Rig("decode", handoff=handed())
    job = rig.wake(stage="decode")
    rig.arrive()
    rig.store.answers["renew"] = lambda items: [(items[0], Final(RequestState.CANCELLED, "client"))]

    rig.turn(0.6)

    assert job.told[-1] == ("revoke", "client")
    assert messages.Drop(RID) in rig.heard()


def test_preempted_goes_back_to_the_queue() -> None:
    rig = Rig("decode", handoff=handed())
    job = rig.wake(stage="decode")
    rig.arrive()

    rig.says(messages.Preempted(RID))

    assert rig.store.called("release")[0][:2] == (RID, 3)
    assert job.words == ["accept", "retry"]


def test_an_engine_that_died_during_the_handoff_gives_the_request_back() -> None:
    rig = Rig("decode", handoff=NO_ANSWER)
    rig.arrive()
    rig.engine.close()
    rig.parts.read_engine()
    rig.store.answers["handoff"] = handed()

    rig.turn(0.5)

    assert rig.store.called("release")[0][:2] == (RID, 3)
    assert rig.parts.ctx.live == {}
