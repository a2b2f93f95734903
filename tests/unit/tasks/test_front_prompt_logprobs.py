"""Prompt logprobs on their way through the output thread: once, with the first token, also over a hand-off."""

from __future__ import annotations

import msgspec

from engines import messages
from kvstore.state.entries import PromptLogprobs, TokenEntry
from kvstore.state.records import Record
from kvstore.state.replies import Ok
from kvstore.state.transitions import RequestState
from tests.unit.tasks.front_rig import NO_ANSWER, RID, Rig, claimed, handed

SCORES = PromptLogprobs(0, b"\0\0\x80\xbf", b"\1\0\0\0")


def record(n: int) -> Record:
    body = claimed().body
    return Record(
        rid=RID,
        state=RequestState.PREFILLING,
        phase="",
        reason="",
        epoch=2,
        owners={},
        attempts=1,
        crash_attempts=0,
        deadline_ms=0,
        wake_n=1,
        n=[n],
        fin=[False],
        body=body,
    )


def entries(rig: Rig) -> list[TokenEntry]:
    return [msgspec.msgpack.decode(item.tokens, type=TokenEntry) for item in rig.appended]


def first_token(rig: Rig) -> None:
    epoch = rig.parts.ctx.live[RID].engine_epoch
    rig.says(messages.Tokens(1, [messages.TokenOut(RID, 0, 0, [300], None, "", epoch=epoch, prompt_logprobs=SCORES)]))


def test_they_are_published_with_the_first_token_and_not_again() -> None:
    rig = Rig("prefill", claim=claimed(prompt_logprobs=0))
    rig.wake()

    first_token(rig)
    rig.turn()
    rig.tokens([301], 1)
    rig.turn()

    assert [entry.prompt_logprobs for entry in entries(rig)] == [SCORES, None]


def test_they_are_published_again_when_the_first_call_had_no_answer() -> None:
    rig = Rig("prefill", claim=claimed(prompt_logprobs=0))
    rig.wake()
    rig.store.answers["append_batch"] = NO_ANSWER

    first_token(rig)
    rig.turn()
    rig.tokens([301], 1)
    rig.store.answers["append_batch"] = lambda items: [Ok()] * len(items)
    rig.turn(1.0)

    assert entries(rig)[-1].prompt_logprobs == SCORES
    assert entries(rig)[-1].token_ids == (300, 301)


def test_an_arrival_waits_until_its_first_token_is_in_the_log() -> None:
    rig = Rig("decode", record=record(0), handoff=handed(n=1))

    rig.arrive(prompt_logprobs=0)
    assert rig.store.called("handoff") == []
    rig.store.answers["record"] = record(1)
    rig.turn(0.1)

    assert len(rig.store.called("handoff")) == 1


def test_an_arrival_whose_prompt_logprobs_never_come_goes_back_to_be_computed_again() -> None:
    rig = Rig("decode", record=record(0), handoff=handed(n=0))

    rig.arrive(prompt_logprobs=0)
    for _ in range(30):
        rig.turn(0.1)

    assert rig.store.called("handoff") == []
    assert rig.heard() == [messages.Drop(RID, "x1")]
