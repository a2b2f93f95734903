"""The prefill side of the output thread: claims, publishing, the end of a push."""

from __future__ import annotations

import msgspec
import pytest

from engines import messages
from kvstore.state.entries import FinEntry, TokenEntry
from kvstore.state.hashing import hash_of
from kvstore.state.replies import Busy, Dup, Final, Fork, Gap, Gone, Released, Stale, Turn
from kvstore.state.transitions import RequestState
from tests.unit.tasks.front_rig import NO_ANSWER, RID, Rig, beat, claimed, handed


def test_a_wake_up_is_claimed_and_added_with_its_targets() -> None:
    rig = Rig(claim=claimed())

    job = rig.wake()

    (add,) = rig.heard()
    assert isinstance(add, messages.Add)
    assert (add.rid, add.epoch, add.mode, [t.node for t in add.targets]) == (RID, 2, "push", ["d0@h"])
    assert job.words == ["accept"]


def test_nothing_is_claimed_without_a_decode_worker_to_hand_it_to() -> None:
    rig = Rig(with_peer=False, claim=claimed())

    rig.wake()
    assert rig.store.called("claim") == []

    rig.parts.peers.refresh([beat()])
    rig.turn()
    assert len(rig.store.called("claim")) == 1


def test_no_more_is_claimed_than_a_batch_holds() -> None:
    rig = Rig(claim=claimed())

    for i in range(6):
        rig.wake(f"r{i}-s00")

    assert len(rig.store.called("claim")) == 4


@pytest.mark.parametrize(("reply", "word"), [(Busy(RequestState.DECODING), "succeed"), (Gone(), "succeed")])
def test_a_request_that_is_somebody_elses_is_only_acked(reply: object, word: str) -> None:
    assert Rig(claim=reply).wake().words == [word]


def test_a_repeated_wake_up_of_a_live_request_is_shown_and_not_claimed_again() -> None:
    rig = Rig(claim=claimed())
    rig.wake()

    second = rig.wake()

    assert second.words == ["accept"]
    assert len(rig.store.called("claim")) == 1


def test_a_claim_without_an_answer_is_repeated_with_the_same_token() -> None:
    rig = Rig(claim=NO_ANSWER)
    rig.wake()
    rig.store.answers["claim"] = claimed()

    rig.turn(0.2)

    tokens = [args[1] for args in rig.store.called("claim")]
    assert len(tokens) == 2
    assert len(set(tokens)) == 1


def test_tokens_of_one_turn_are_one_item_with_hashes_and_text() -> None:
    rig = Rig(claim=claimed())
    rig.wake()

    rig.tokens([300])
    rig.tokens([301], 1)
    rig.turn()

    (item,) = rig.appended
    entry = msgspec.msgpack.decode(item.tokens, type=TokenEntry)
    assert entry.token_ids == (300, 301)
    assert (item.index, item.count, item.prefix_hash, item.new_hash) == (0, 2, 0, hash_of([300, 301]))
    assert item.state == "PREFILLING"


@pytest.mark.parametrize("n", [0, 1])
def test_after_gap_or_dup_the_log_gets_what_it_lacks(n: int) -> None:
    rig = Rig(claim=claimed())
    rig.wake()
    rig.tokens([300])
    rig.turn()
    rig.tokens([301], 1)
    rig.store.answers["append_batch"] = [Gap(n)] if n == 0 else [Dup(n)]

    rig.turn(0.1)
    rig.turn(0.1)

    assert [rig.appended[-1].index, rig.appended[-1].count] == [n, 2 - n]


def test_without_an_answer_the_same_tokens_go_again() -> None:
    rig = Rig(claim=claimed())
    rig.wake()
    rig.store.answers["append_batch"] = NO_ANSWER
    rig.tokens([300])
    rig.turn()
    rig.store.answers["append_batch"] = lambda items: [Gap(0) for _ in items]

    rig.turn(0.05)
    assert len(rig.appended) == 1, "not before the pause is over"
    rig.turn(0.1)

    assert rig.appended[0] == rig.appended[1]


def test_fork_gives_the_request_back_and_wakes_somebody() -> None:
    rig = Rig(claim=claimed(), release=Released(RequestState.QUEUED, [Turn(RID, 78)]))
    job = rig.wake()
    rig.store.answers["append_batch"] = [Fork()]
    rig.tokens([300])

    rig.turn()

    assert job.words == ["accept", "retry"]
    assert rig.hub.turns == [Turn(RID, 78)]
    assert messages.Drop(RID) in rig.heard()


@pytest.mark.parametrize(
    ("verdict", "word"),
    [
        (Stale(9, RequestState.PREFILLING), "retry"),
        (Final(RequestState.CANCELLED), "revoke"),
        (Final(RequestState.EXPIRED), "fail"),
        (Gone(), "succeed"),
    ],
)
def test_what_is_not_ours_any_more_stops_at_once(verdict: Stale | Final | Gone, word: str) -> None:
    rig = Rig(claim=claimed())
    job = rig.wake()
    rig.store.answers["append_batch"] = [verdict]
    rig.tokens([300])

    rig.turn()

    assert job.words == ["accept", word]
    assert messages.Drop(RID) in rig.heard()
    assert rig.parts.ctx.live == {}


def test_a_handoff_that_overtook_the_first_token_waits_for_the_engines_word() -> None:
    rig = Rig(claim=claimed())
    job = rig.wake()
    rig.store.answers["append_batch"] = [Stale(3, RequestState.DECODING)]
    rig.tokens([300])
    rig.turn()
    assert job.words == ["accept"]

    rig.says(messages.Pushed(rid=RID, xfer="x", outcome="handed"))

    assert job.told[-1] == ("succeed", "handed")
    assert messages.Drop(RID) not in rig.heard()


def test_a_refused_push_gives_the_request_back_after_a_pause() -> None:
    rig = Rig(claim=claimed(), release=Released(RequestState.QUEUED, [Turn(RID, 78)]))
    job = rig.wake()

    rig.says(messages.Pushed(rid=RID, xfer="x", outcome="refused"))

    assert rig.hub.turns == []
    rig.turn(0.3)
    assert rig.hub.turns == [Turn(RID, 78)]
    assert job.words == ["accept", "retry"]


def test_granted_shows_the_sequence_in_the_decode_workers_queue() -> None:
    rig = Rig(claim=claimed())
    rig.wake()

    rig.says(messages.Granted(RID, "x", "d0@h", 2))

    assert rig.hub.decodes == [(RID, 77, 2, "decode.tiny-chat.d0@h")]


def test_a_request_whose_first_token_is_its_last_ends_here() -> None:
    rig = Rig(claim=claimed(max_tokens=1))
    job = rig.wake()

    rig.tokens([300], finish="length")
    rig.turn()

    fin = msgspec.msgpack.decode(rig.appended[0].fin, type=FinEntry)
    assert (fin.state, fin.reason) == ("FINISHED", "length")
    assert job.told[-1] == ("succeed", "finished")


def test_a_failed_request_is_finished_as_failed() -> None:
    rig = Rig(claim=claimed())
    job = rig.wake()

    rig.says(messages.Failed(RID, "context_length_exceeded", "too long"))

    assert rig.store.called("finish")[0][3] == "context_length_exceeded"
    assert job.words == ["accept", "fail"]


def test_a_suspect_waits_until_it_is_alone_and_nobody_joins_it() -> None:
    rig = Rig(claim=claimed())
    rig.wake("r1-s00")
    rig.heard()
    rig.store.answers["claim"] = claimed(crash_attempts=2)

    rig.wake(RID)
    rig.wake("r2-s00")
    assert rig.heard() == []

    rig.says(messages.Pushed(rid="r1-s00", xfer="x", outcome="handed"))
    rig.turn()
    assert [m.rid for m in rig.heard() if isinstance(m, messages.Add)] == [RID]
    assert len(rig.store.called("claim")) == 2
    rig.store.answers["claim"] = claimed()
    rig.says(messages.Pushed(rid=RID, xfer="x", outcome="handed"))
    rig.turn()
    assert len(rig.store.called("claim")) == 3


def test_role_both_hands_to_itself_before_it_publishes() -> None:
    rig = Rig("both", claim=claimed(), handoff=NO_ANSWER)
    rig.wake()
    rig.tokens([300])
    rig.store.answers["renew"] = lambda items: [(items[0], Stale(3, RequestState.DECODING))]
    rig.turn(0.6)
    assert rig.appended == []
    assert RID in rig.parts.ctx.live, "its own handoff is no verdict"

    rig.store.answers.update(handoff=handed(), renew=[])
    rig.turn(1.0)

    assert [(item.epoch, item.state) for item in rig.appended] == [(3, "DECODING")]


def test_the_engines_death_ends_the_incarnation_and_gives_everything_back() -> None:
    evicted = type("Evicted", (), {"turns": [Turn(RID, 78)]})()
    rig = Rig(claim=claimed(), evict=NO_ANSWER)
    job = rig.wake()
    former = rig.parts.ctx.identity.incarnation

    rig.engine.close()
    rig.parts.read_engine()

    assert job.words == ["accept", "retry"]
    assert rig.parts.ctx.live == {}
    assert rig.wake("r2-s00").words == ["requeue"]
    rig.store.answers["evict"] = evicted
    rig.turn(0.5)
    assert rig.store.called("evict")[-1] == (former, "engine")
    assert rig.hub.turns == [Turn(RID, 78)]
    assert rig.hub.engines == [former, rig.parts.ctx.identity.incarnation]


def test_draining_requeues_hands_and_releases_at_the_deadline() -> None:
    rig = Rig(claim=claimed(), release=Released(RequestState.QUEUED, [Turn(RID, 78)]))
    live = rig.wake()
    rig.parts.drain(5.0)
    late = rig.wake("r2-s00")

    rig.turn(4.0)
    assert (live.words, late.words) == (["accept"], ["requeue"])
    rig.turn(1.1)

    assert live.words == ["accept", "retry"]
    assert rig.hub.turns == [Turn(RID, 78)]
    assert rig.parts.drain_.state == "drained"
