"""Following one request, in virtual time, with hand-made hints and a small real log."""

from __future__ import annotations

import msgspec
import pytest

from kvstore.clock import VirtualClock
from kvstore.errors import StateUnavailable
from kvstore.state.entries import FeedItem, FinEntry, TokenEntry
from kvstore.state.hashing import hash_of
from kvstore.state.records import NewRequest
from kvstore.state.replies import Accepted, At, Attached, Gone, Log, Ok
from kvstore.state.replies import Final as Ended
from kvstore.state.transitions import RequestState
from webapp.errors import StreamFailed
from webapp.streaming.follower import Came, ChoiceEnded, Follower, TokensCame
from webapp.streaming.position import Position, digest_of

RID = "a-s00"
END = FinEntry("FINISHED", "stop")


class LogState:
    """The part of the state server that a follower sees: one request of one choice."""

    def __init__(self, ids: list[int], fin: FinEntry | None = None) -> None:
        self.ids = ids
        self.fin = fin
        self.state = RequestState.FINISHED if fin else RequestState.DECODING
        self.is_gone = False
        self.is_away = False
        self.num_accepts = 0
        self.refilled: list[TokenEntry] = []

    def accept(self, _request: NewRequest) -> Accepted:
        self.num_accepts += 1
        self.is_gone, self.ids = False, []
        return Accepted("OK", RequestState.QUEUED, [0], [])

    def attach(self, _rid: str, _gateway: str) -> Attached | Gone:
        if self.is_away:
            raise StateUnavailable(command="attach", reason="timeout", detail="test")
        return Gone() if self.is_gone else Attached(self.state, [len(self.ids)], [self.fin is not None], "")

    def read_log(self, _rid: str, _c: int, after_n: int) -> Log:
        return Log([entry(self.ids, 0)] if len(self.ids) > after_n else [], self.fin)

    def refill(self, _rid: str, _c: int, entry: TokenEntry, *, new_hash: int) -> Ok | At | Ended | Gone:
        if entry.index != len(self.ids) or entry.prefix_hash != hash_of(self.ids):
            return At(len(self.ids))
        assert new_hash == hash_of([*self.ids, *entry.token_ids])
        self.refilled.append(entry)
        self.ids = [*self.ids, *entry.token_ids]
        return Ok()


def entry(ids: list[int], start: int, *, prefix: list[int] | None = None) -> TokenEntry:
    """An entry with the tokens of `ids` from `start` on, behind `prefix` (by default the true one)."""
    before = ids[:start] if prefix is None else prefix
    tail = tuple(ids[start:])
    return TokenEntry(start, hash_of(before), tail, tuple(f"<{i}>" for i in tail))


def hint(part: TokenEntry, *, n: int | None = None, fin: FinEntry | None = None) -> FeedItem:
    encode = msgspec.msgpack.encode
    tokens = encode(part) if part.token_ids else b""
    return FeedItem(RID, 0, part.end if n is None else n, part.prefix_hash, tokens, encode(fin) if fin else b"")


def make_follower(state: LogState, clock: VirtualClock, *, can_accept: bool = True) -> Follower:
    request = NewRequest(
        rid=RID,
        model="m",
        tenant="t",
        priority=0,
        deadline_in_s=60,
        seed=1,
        k=1,
        params=b"",
        prompt_ids=[1],
        gateway="gw",
        body_hash="",
    )
    return Follower(
        state,
        RID,
        "gw",
        k=1,
        deadline_s=clock() + 60,
        clock=clock,
        send_turns=lambda _turns: None,
        request=request if can_accept else None,
    )


def ids_of(came: list[Came]) -> list[int]:
    return [i for event in came if isinstance(event, TokensCame) for i in event.entry.token_ids]


def test_hints_in_order_are_told_once() -> None:
    state, clock = LogState([]), VirtualClock()
    follower = make_follower(state, clock)
    assert ids_of(follower.offer(hint(entry([1, 2], 0)))) == [1, 2]
    assert ids_of(follower.offer(hint(entry([1, 2], 0)))) == []
    assert ids_of(follower.offer(hint(entry([1, 2, 3], 1)))) == [3]
    (end,) = follower.offer(hint(entry([1, 2, 3], 3), fin=END))
    assert end == ChoiceEnded(0, END)
    assert follower.has_ended
    assert follower.offer(hint(entry([1, 2, 3], 3), fin=END)) == []


def test_a_gap_is_read_from_the_log() -> None:
    state = LogState([1, 2, 3])
    follower = make_follower(state, VirtualClock())
    assert ids_of(follower.offer(hint(entry([1, 2, 3], 2)))) == [1, 2, 3]


def test_a_hint_with_another_prefix_is_not_spliced() -> None:
    state = LogState([1, 2, 3])
    follower = make_follower(state, VirtualClock())
    follower.offer(hint(entry([1, 2], 0)))
    assert ids_of(follower.offer(hint(entry([1, 9, 4], 2, prefix=[1, 9])))) == [3]


def test_a_hint_that_repeats_other_ids_is_not_spliced() -> None:
    state = LogState([1, 2, 3])
    follower = make_follower(state, VirtualClock())
    follower.offer(hint(entry([1, 2], 0)))
    assert ids_of(follower.offer(hint(entry([1, 9, 4], 1, prefix=[1])))) == [3]


def test_a_second_of_silence_is_due_a_look() -> None:
    state, clock = LogState([1, 2]), VirtualClock()
    follower = make_follower(state, clock)
    follower.offer(hint(entry([1], 0)))
    assert follower.look_in_s() == pytest.approx(1.0)
    clock.advance(1.1)
    assert follower.look_in_s() == 0
    assert ids_of(follower.look()) == [2]


def test_a_log_of_another_text_ends_the_stream() -> None:
    state = LogState([1, 7, 8])
    follower = make_follower(state, VirtualClock())
    follower.offer(hint(entry([1, 2], 0)))
    with pytest.raises(StreamFailed) as caught:
        follower.look()
    assert caught.value.code == "stream_diverged"


def test_a_tail_that_the_server_lost_is_put_back_with_its_texts() -> None:
    state = LogState([1])
    follower = make_follower(state, VirtualClock())
    follower.offer(hint(entry([1, 2], 0)))
    follower.offer(hint(entry([1, 2, 3], 2)))
    assert follower.look() == []
    (back,) = state.refilled
    assert (back.index, back.token_ids, back.texts) == (1, (2, 3), ("<2>", "<3>"))
    assert state.ids == [1, 2, 3]


def test_a_lost_record_is_accepted_again_three_times_then_fails() -> None:
    state, clock = LogState([]), VirtualClock()
    follower = make_follower(state, clock)
    follower.offer(hint(entry([1, 2], 0)))
    for _ in range(3):
        state.is_gone = True
        assert follower.look() == []
        assert state.ids == [1, 2]
    state.is_gone = True
    with pytest.raises(StreamFailed) as caught:
        follower.look()
    assert (caught.value.status, state.num_accepts) == (503, 3)


def test_a_reader_that_came_later_cannot_accept_again() -> None:
    state = LogState([])
    state.is_gone = True
    with pytest.raises(StreamFailed) as caught:
        make_follower(state, VirtualClock(), can_accept=False).look()
    assert caught.value.code == "stream_expired"


def test_an_outage_is_waited_for_until_the_deadline() -> None:
    state, clock = LogState([1, 2], END), VirtualClock()
    follower = make_follower(state, clock)
    state.is_away = True
    assert follower.look() == []
    clock.advance(50)
    assert follower.look() == []
    state.is_away = False
    assert ids_of(follower.look()) == [1, 2]
    assert follower.has_ended


def test_an_outage_past_the_deadline_fails() -> None:
    state, clock = LogState([]), VirtualClock()
    follower = make_follower(state, clock)
    state.is_away = True
    clock.advance(63)
    with pytest.raises(StreamFailed) as caught:
        follower.look()
    assert caught.value.code == "deadline_exceeded"


def test_a_finished_log_that_is_shorter_than_what_was_sent_has_diverged() -> None:
    state = LogState([1], END)
    follower = make_follower(state, VirtualClock())
    follower.offer(hint(entry([1, 2], 0)))
    with pytest.raises(StreamFailed) as caught:
        follower.look()
    assert caught.value.code == "stream_diverged"


def test_a_resumed_client_gets_only_what_follows_its_position() -> None:
    follower = make_follower(LogState([1, 2, 3], END), VirtualClock(), can_accept=False)
    follower.resume_at(Position((2,), (False,), digest_of([hash_of([1, 2])])))
    came = follower.look()
    assert ids_of(came) == [3]
    assert follower.has_ended


def test_a_resumed_client_ahead_of_the_log_waits_for_it() -> None:
    state = LogState([1])
    follower = make_follower(state, VirtualClock(), can_accept=False)
    follower.resume_at(Position((2,), (False,), digest_of([hash_of([1, 2])])))
    assert follower.look() == []
    state.ids = [1, 2, 3]
    assert ids_of(follower.look()) == [3]


def test_a_resumed_client_with_another_text_is_told_so() -> None:
    follower = make_follower(LogState([1, 2, 3]), VirtualClock(), can_accept=False)
    follower.resume_at(Position((2,), (False,), digest_of([hash_of([1, 9])])))
    with pytest.raises(StreamFailed) as caught:
        follower.look()
    assert caught.value.code == "stream_diverged"
