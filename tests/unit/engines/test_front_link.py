"""The engine's end of the socket to its front: two threads write, one of which never waits."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from engines.front_link import FrontLink
from engines.messages import EngineMessage, FrameReader, Incoming, NoGrant, decode_engine

Pair = tuple[FrontLink, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield FrontLink(ours), theirs


def drain(theirs: socket.socket, reader: FrameReader | None = None) -> list[EngineMessage]:
    """What is there now."""
    reader, told = reader or FrameReader(), []
    theirs.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while chunk := theirs.recv(1 << 20):
            told += [decode_engine(body) for body in reader.feed(chunk)]
    return told


def test_post_is_out_at_once_and_in_order(pair: Pair) -> None:
    link, theirs = pair

    link.send(Incoming("r", "x1"))
    assert link.post(Incoming("r", "x2"))
    link.send(Incoming("r", "x3"))

    assert drain(theirs) == [Incoming("r", f"x{i}") for i in (1, 2, 3)]


def test_post_into_a_full_socket_returns_and_the_rest_follows_whole(pair: Pair) -> None:
    link, theirs = pair
    large = NoGrant("r", "x" * 300_000)

    num_posted = 1
    while link.post(large):
        num_posted += 1
        assert num_posted < 100, "the socket never fills"
    assert not link.post(Incoming("r", "last"))

    reader = FrameReader()
    told: list[EngineMessage] = drain(theirs, reader)
    while len(told) < num_posted + 1:
        flusher = threading.Thread(target=link.flush)
        flusher.start()
        while flusher.is_alive():
            told += drain(theirs, reader)
        flusher.join()
        told += drain(theirs, reader)

    assert told == [large] * num_posted + [Incoming("r", "last")]


def test_post_while_the_engine_writes_leaves_its_message_to_the_engine(pair: Pair) -> None:
    link, theirs = pair
    with link._sending:  # the engine thread is in `send`
        assert not link.post(Incoming("r", "x"))
    assert drain(theirs) == []

    link.flush()

    assert drain(theirs) == [Incoming("r", "x")]


def test_messages_of_two_threads_never_mix(pair: Pair) -> None:
    link, theirs = pair
    waiting: list[EngineMessage] = [NoGrant(f"b{i}", "y" * (i % 97) * 50) for i in range(2000)]
    poster = threading.Thread(target=lambda: [link.post(message) for message in waiting])
    told: list[EngineMessage] = []
    reader = FrameReader()
    poster.start()
    for i in range(2000):
        link.send(NoGrant(f"a{i}", "x" * (i % 89) * 50))
        told += drain(theirs, reader)
    while poster.is_alive():
        told += drain(theirs, reader)
    poster.join()
    link.flush()
    told += drain(theirs, reader)

    for name in "ab":
        rids = [message.rid for message in told if isinstance(message, NoGrant) and message.rid[0] == name]
        assert rids == [f"{name}{i}" for i in range(2000)]


def test_post_to_a_front_that_is_gone_leaves_the_error_to_the_engine_thread(pair: Pair) -> None:
    link, theirs = pair
    theirs.close()

    assert not link.post(Incoming("r", "x"))
    with pytest.raises(ConnectionError):
        link.flush()
