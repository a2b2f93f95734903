"""Pieces, chunks and SSE bytes: what is told when, and that streams and whole answers say the same."""

from __future__ import annotations

from typing import Any

import pytest

from configs.schema import ModelSettings
from kvstore.clock import VirtualClock
from kvstore.state.entries import FinEntry, TokenEntry
from tests.gateway_harness import TINY_CHAT
from webapp.admission import Admission
from webapp.errors import ApiError, Overloaded
from webapp.openai.answers import Writer, make_writer
from webapp.openai.call import CallNotes, Prompt
from webapp.openai.pieces import Piece, PieceMaker
from webapp.openai.served_model import ServedModel, load_served_model
from webapp.streaming import sse
from webapp.streaming.mailbox import MAX_HINTS, FeedReader, Mailbox
from webapp.streaming.position import Position, read_position, sign_position
from webapp.streaming.settling import Settler


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return load_served_model(ModelSettings(path=str(TINY_CHAT)), version="test")


def _entry(index: int, *texts: str) -> TokenEntry:
    return TokenEntry(index, 0, tuple(range(10 + index, 10 + index + len(texts))), texts)


def _pieces() -> list[Piece]:
    maker = PieceMaker(0)
    return [
        *maker.tokens(_entry(0, "a")),
        *maker.tokens(_entry(1, "")),
        *maker.tokens(_entry(2, "bc", "")),
        *maker.end(FinEntry("FINISHED", "stop", "", "d", 2)),
    ]


def _writer(model: ServedModel, api: str, **notes: Any) -> Writer:
    prompt = Prompt(token_ids=[5, 6], echo=notes.pop("echo", ""))
    call = CallNotes(api=api, created=1, return_token_ids=True, **notes)
    return make_writer(id="x", model=model, notes=call, prompts=[prompt], choices_per_prompt=1)


def test_tokens_without_text_wait_for_it() -> None:
    told = [(p.text, [t.token_id for t in p.tokens], p.num_tokens) for p in _pieces()]
    assert told == [("a", [10], 1), ("bc", [11, 12], 3), ("d", [13], 4), ("", [], 4)]


def test_an_end_with_no_text_takes_what_waited() -> None:
    maker = PieceMaker(0)
    maker.tokens(_entry(0, ""))
    (end,) = maker.end(FinEntry("FINISHED", "stop"))
    assert ([t.token_id for t in end.tokens], end.is_first, end.num_tokens) == ([10], True, 1)


@pytest.mark.parametrize("api", ["chat", "completion"])
def test_chunks_and_the_whole_answer_say_the_same(model: ServedModel, api: str) -> None:
    pieces = _pieces()
    streaming, whole = _writer(model, api), _writer(model, api)
    chunks = [c["choices"][0] for piece in pieces for c in streaming.chunks(0, piece)]
    choice = whole.answer([pieces])["choices"][0]

    text_of = (lambda c: c["delta"].get("content", "")) if api == "chat" else (lambda c: c["text"])
    assert "".join(map(text_of, chunks)) == (choice["message"]["content"] if api == "chat" else choice["text"])
    assert [i for c in chunks for i in c["token_ids"]] == choice["token_ids"] == [10, 11, 12, 13]
    assert [c["prompt_token_ids"] for c in chunks if "prompt_token_ids" in c] == [[5, 6]]
    assert [c["finish_reason"] for c in chunks if c["finish_reason"]] == ["stop"]
    assert chunks[-1]["finish_reason"] == "stop"
    assert text_of(chunks[-1]) == ""
    assert streaming.usage.body() == whole.usage.body()
    assert whole.usage.body()["prompt_tokens_details"]["cached_tokens"] == 2


def test_chat_chunks_always_have_their_keys_and_no_empty_delta(model: ServedModel) -> None:
    writer = _writer(model, "chat")
    chunks = [c for piece in _pieces() for c in writer.chunks(0, piece)]
    assert all({"logprobs", "finish_reason"} <= c["choices"][0].keys() for c in chunks)
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas == [
        {"role": "assistant", "content": ""}, {"content": "a"}, {"content": "bc"}, {"content": "d"}, {},
    ]  # fmt: skip


def test_continuous_usage_counts_up(model: ServedModel) -> None:
    writer = _writer(model, "completion", include_usage=True, continuous_usage_stats=True)
    counts = [c["usage"]["completion_tokens"] for piece in _pieces() for c in writer.chunks(0, piece)]
    assert counts == [1, 3, 4, 4]
    assert writer.last_chunks()[0]["choices"] == []


def test_echo_is_the_first_text_of_a_completion(model: ServedModel) -> None:
    writer = _writer(model, "completion", echo="Hi ")
    first = writer.chunks(0, _pieces()[0])
    assert [c["choices"][0]["text"] for c in first] == ["Hi ", "a"]


def test_events_are_single_lines_and_a_heartbeat_has_no_blank_line() -> None:
    event = sse.data_event({"text": "a\nb"}, event_id="1-a-b")
    assert event == b'id: 1-a-b\ndata: {"text":"a\\nb"}\n\n'
    assert sse.HEARTBEAT == b": hb\n"
    error = ApiError(502, "upstream_failed", "lost")
    assert sse.error_event(error.body()).startswith(b"event: error\ndata: {")
    assert sse.error_event(error.body()).endswith(b"\n\ndata: [DONE]\n\n")


def test_a_position_is_read_back_only_for_its_request_and_secret() -> None:
    position = Position((12, 9), (False, True), "abc")
    word = sign_position("a-s00", position, b"secret")
    assert word.startswith("12.9e-abc-")
    assert read_position("a-s00", word, b"secret") == position
    for rid, text, secret in (
        ("b-s00", word, b"secret"),
        ("a-s00", word, b"other"),
        ("a-s00", "13" + word[2:], b"secret"),
        ("a-s00", "", b"secret"),
        ("a-s00", "é-ü", b"secret"),
    ):
        assert read_position(rid, text, secret) is None


def test_admission_refuses_the_call_beyond_its_limit() -> None:
    admission = Admission(limit=1, clock=VirtualClock(), jitter=lambda: 0.0)
    admission.admit()
    with pytest.raises(Overloaded) as caught:
        admission.admit()
    assert (caught.value.code, caught.value.headers["Retry-After"]) == ("overloaded", "1")
    admission.leave()
    admission.admit()


def test_admission_refuses_when_no_worker_was_seen_for_thirty_seconds() -> None:
    clock = VirtualClock()
    admission = Admission(limit=1, clock=clock)
    clock.advance(30.5)
    with pytest.raises(Overloaded) as caught:
        admission.admit()
    assert caught.value.code == "not_ready"
    admission.worker_seen()
    admission.admit()


def test_an_end_is_settled_after_one_two_and_four_seconds() -> None:
    clock = VirtualClock()
    settler = Settler(lambda _rid, _reason: None, clock=clock)
    settler.settle("a-s00", "settled:FINISHED")
    due = []
    for _ in range(10):
        clock.advance(0.5)
        due.append(len(settler.due()))
    assert due == [0, 1, 0, 1, 0, 0, 0, 1, 0, 0]


def test_hints_reach_only_who_waits_and_an_overflow_is_told() -> None:
    from kvstore.state.entries import FeedItem

    class NoFeed:
        def read_feed(self, _gateway: str, _cursors: dict[int, str], _block_ms: int) -> list[FeedItem]:
            return []

    reader, box = FeedReader(NoFeed(), "gw"), Mailbox()
    reader.subscribe("a-s00", box)
    reader.deliver([FeedItem("a-s00", 0, 1, 0), FeedItem("b-s00", 0, 1, 0)])
    assert box.wait(0) == ([FeedItem("a-s00", 0, 1, 0)], False)
    for _ in range(MAX_HINTS + 1):
        reader.deliver([FeedItem("a-s00", 0, 1, 0)])
    items, has_lost = box.wait(0)
    assert (len(items), has_lost) == (MAX_HINTS, True)
