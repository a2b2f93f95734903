"""The output thread of a decode worker that runs out of blocks: a request moves on, or goes back to the queue."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engines import messages
from kvstore.state.replies import Ok, Stale
from kvstore.state.transitions import RequestState
from tasks.front.claims import has_been_preempted
from tasks.front.requests import Phase
from tests.unit.tasks.front_rig import RID, Rig, claimed, handed


def moving_rig() -> Rig:
    """A request that was handed to this worker, and for which another decode worker has just promised blocks."""
    rig = Rig("decode", handoff=handed(n=1), release=None)
    rig.arrive()
    rig.says(messages.Granted(RID, "x2", "d0@h", 1))
    rig.heard()
    return rig


def pushed(outcome: str) -> messages.Pushed:
    return messages.Pushed(rid=RID, xfer="x2", outcome=outcome)  # type: ignore[arg-type]


def test_the_next_worker_is_shown_the_request_under_a_task_id_of_its_own() -> None:
    rig = moving_rig()

    (rid, wake_n, attempt, queue) = rig.hub.decodes[0][:4]
    assert (rid, wake_n, attempt, queue) == (RID, 3, 1, "decode.tiny-chat.d0@h")


def test_a_request_that_moved_ends_here_without_a_release() -> None:
    rig = moving_rig()
    job = rig.wake(stage="decode")

    rig.says(pushed("handed"))

    assert job.words == ["accept", "succeed"]
    assert RID not in rig.parts.ctx.live
    assert rig.store.called("release") == []
    rig.turn(1.0)
    assert rig.store.called("set_spans") == [], "the times of its prefill are not overwritten"
    assert rig.heard() == []


def test_an_append_that_the_receivers_handoff_overtook_waits_for_the_engines_word() -> None:
    rig = moving_rig()
    rig.store.answers["append_batch"] = lambda items: [Stale(4, RequestState.DECODING)] * len(items)
    rig.tokens([301], 1)
    rig.turn()

    assert rig.parts.ctx.live[RID].phase is Phase.TAKEN
    assert rig.heard() == [], "the engine must not give its transfer up"
    rig.says(pushed("handed"))
    assert RID not in rig.parts.ctx.live


def test_tokens_of_the_last_step_are_still_published_while_the_request_moves() -> None:
    rig = moving_rig()
    rig.store.answers["append_batch"] = lambda items: [Ok()] * len(items)

    rig.tokens([301], 1)
    rig.turn()

    assert [(item.index, item.count, item.epoch) for item in rig.appended] == [(1, 1, 3)]


@pytest.mark.parametrize("word", [messages.NoGrant(RID, "full"), pushed("failed"), pushed("refused")])
def test_a_move_that_fails_is_a_release(word: messages.EngineMessage) -> None:
    rig = moving_rig()

    rig.says(word)
    rig.turn()

    assert [call[0] for call in rig.store.called("release")] == [RID]
    assert RID not in rig.parts.ctx.live


def test_the_engine_of_role_both_learns_what_it_may_pass_on() -> None:
    rig = Rig("both", claim=claimed(), handoff=handed(n=0))
    rig.wake()
    rig.heard()

    rig.tokens([300])
    rig.turn()

    (owner,) = [message for message in rig.heard() if isinstance(message, messages.Owner)]
    assert (owner.rid, owner.epoch) == (RID, 3)
    assert owner.token == rig.store.called("handoff")[0][3]


@pytest.mark.parametrize(
    ("epoch", "attempts", "crash_attempts", "expected"),
    [
        (2, 1, 0, False),  # accept 1, claim 2
        (4, 2, 0, False),  # released before it was handed over
        (5, 2, 0, True),  # handed over, released by the decode worker
        (5, 2, 1, False),  # handed over, the decode worker died
        (6, 2, 0, True),  # moved once, then released
    ],
)
def test_the_epoch_tells_whether_a_decode_worker_gave_it_up(
    epoch: int, attempts: int, crash_attempts: int, expected: bool
) -> None:
    reply = replace(claimed(crash_attempts=crash_attempts), epoch=epoch, attempts=attempts)

    assert has_been_preempted(reply) is expected


def test_what_a_decode_worker_gave_up_is_claimed_with_all_the_blocks_it_can_need() -> None:
    rig = Rig("prefill", claim=replace(claimed(), epoch=5, attempts=2))
    rig.wake()

    (add,) = rig.heard()
    assert isinstance(add, messages.Add)
    assert add.reserve_full
