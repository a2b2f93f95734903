"""Calls on the state server that share a round trip, and are repeated until it answers. Virtual time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from kvstore.clock import VirtualClock
from kvstore.errors import BadRecord, KVStoreError, StateError, StateUnavailable
from tasks.front.calls import MAX_TOGETHER, RETRY_FIRST_S, CallGroup, RepeatedCalls

NO_ANSWER = StateUnavailable(command="x", reason="timeout", detail="")


class Server:
    """Answers `n` with `10 * n`, or with what a test wrote down for it."""

    def __init__(self) -> None:
        self.sent: list[list[int]] = []
        self.answers: dict[int, KVStoreError] = {}
        self.is_away = False

    def call_each(self, items: Sequence[int]) -> list[int | KVStoreError]:
        self.sent.append(list(items))
        if self.is_away:
            raise NO_ANSWER
        return [self.answers.get(n, 10 * n) for n in items]


class Caller:
    def __init__(self) -> None:
        self.clock = VirtualClock(0.0)
        self.calls = RepeatedCalls(self.clock)
        self.server = Server()
        self.group: CallGroup[int, int] = CallGroup(self.server.call_each)
        self.replies: list[int] = []
        self.errors: list[KVStoreError] = []

    def gather(self, n: int, what: str = "", group: CallGroup[int, int] | None = None) -> None:
        self.calls.gather(what or f"call {n}", group or self.group, n, self.replies.append, self.errors.append)


def test_calls_that_lie_next_to_each_other_go_out_together_and_are_answered_in_order() -> None:
    caller = Caller()
    for n in (3, 1, 2):
        caller.gather(n)
    assert caller.server.sent == [], "not before the turn's `run`"

    caller.calls.run()

    assert caller.server.sent == [[3, 1, 2]]
    assert caller.replies == [30, 10, 20]
    assert len(caller.calls) == 0


def test_a_call_of_another_kind_in_between_keeps_its_place() -> None:
    caller = Caller()
    caller.gather(1)
    caller.gather(2)

    caller.calls.do("other", lambda: 7, caller.replies.append)
    caller.gather(3)
    caller.calls.run()

    assert caller.server.sent == [[1, 2], [3]]
    assert caller.replies == [10, 20, 7, 30]


def test_two_groups_never_share_a_round_trip() -> None:
    caller = Caller()
    caller.gather(1)
    caller.gather(2, group=CallGroup(caller.server.call_each))

    caller.calls.run()

    assert caller.server.sent == [[1], [2]]


def test_the_same_call_twice_is_sent_again_only_when_the_first_is_answered() -> None:
    caller = Caller()
    for n, what in ((1, "handoff a"), (2, "handoff b"), (3, "handoff a"), (4, "handoff c")):
        caller.gather(n, what)

    caller.calls.run()

    assert caller.server.sent == [[1, 2], [3, 4]]
    assert caller.replies == [10, 20, 30, 40]


def test_no_more_go_together_than_one_timeout_can_serve() -> None:
    caller = Caller()
    for n in range(MAX_TOGETHER + 1):
        caller.gather(n)

    caller.calls.run()

    assert [len(items) for items in caller.server.sent] == [MAX_TOGETHER, 1]


def test_what_is_wrong_with_one_call_is_told_to_that_one_alone() -> None:
    caller = Caller()
    caller.server.answers[2] = BadRecord(rid="r2", why="garbled")
    for n in (1, 2, 3):
        caller.gather(n)

    caller.calls.run()

    assert caller.replies == [10, 30]
    assert caller.errors == [caller.server.answers[2]]


def test_a_refusal_of_the_whole_round_trip_is_told_to_each() -> None:
    caller = Caller()
    error = StateError("a foreign server")

    def refuse(_: Sequence[int]) -> list[int | KVStoreError]:
        raise error

    group: CallGroup[int, int] = CallGroup(refuse)
    caller.gather(1, group=group)
    caller.gather(2, group=group)

    caller.calls.run()

    assert caller.errors == [error, error]
    assert len(caller.calls) == 0


def test_without_an_answer_all_go_again_with_the_same_arguments_and_what_came_meanwhile_with_them() -> None:
    caller = Caller()
    caller.server.is_away = True
    caller.gather(1)
    caller.gather(2)
    caller.calls.run()

    caller.gather(3)
    caller.calls.run()
    assert caller.server.sent == [[1, 2]], "not before the pause is over"
    caller.server.is_away = False
    caller.clock.advance(RETRY_FIRST_S)
    caller.calls.run()

    assert caller.server.sent == [[1, 2], [1, 2, 3]]
    assert caller.replies == [10, 20, 30]


def test_a_reply_that_cannot_be_handled_harms_no_other() -> None:
    caller = Caller()

    def fail(_: int) -> None:
        raise RuntimeError("a bug")

    caller.calls.gather("call 1", caller.group, 1, fail)
    caller.server.answers[2] = BadRecord(rid="r2", why="garbled")
    caller.calls.gather("call 2", caller.group, 2, caller.replies.append, lambda _: fail(0))
    caller.gather(3)

    caller.calls.run()

    assert caller.replies == [30]
    assert len(caller.calls) == 0


def test_calls_that_a_reply_gives_rise_to_come_after_the_other_replies_of_its_round_trip() -> None:
    caller = Caller()

    def ask_more(reply: int) -> None:
        caller.replies.append(reply)
        caller.gather(9)

    caller.calls.gather("call 1", caller.group, 1, ask_more)
    caller.gather(2)

    caller.calls.run()

    assert caller.server.sent == [[1, 2], [9]]
    assert caller.replies == [10, 20, 90]


@pytest.mark.parametrize("num_calls", [1, 3])
def test_replies_of_one_round_trip_are_handled_within_the_groups_context(num_calls: int) -> None:
    caller = Caller()
    entered: list[list[int]] = []

    @contextmanager
    def replying() -> Iterator[None]:
        assert caller.replies == []
        yield
        entered.append(list(caller.replies))

    group = CallGroup(caller.server.call_each, replying=replying)
    for n in range(num_calls):
        caller.gather(n, group=group)

    caller.calls.run()

    assert entered == [[10 * n for n in range(num_calls)]]
