"""The front's end of the socketpair: order, one write for what belongs together, and a socket that takes little."""

from __future__ import annotations

import socket

from engines import messages
from tasks.front.link import MAX_VECTORS, EngineLink


def connected() -> tuple[EngineLink, socket.socket]:
    ours, engine = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    engine.setblocking(False)
    link = EngineLink()
    link.attach(ours)
    return link, engine


def promotes(num: int) -> list[messages.FrontMessage]:
    return [messages.Promote(f"r{i}-s00", f"x{i}", 3, "d.1" * (i % 7)) for i in range(num)]


def test_what_is_held_goes_out_at_the_end_in_one_piece() -> None:
    link, engine = connected()
    sent = promotes(8)

    with link.held():
        for message in sent:
            link.send(message)
        assert link.wants_write
        try:
            engine.recv(1)
            raise AssertionError("it went out before the end")
        except BlockingIOError:
            pass

    bodies = messages.FrameReader().feed(engine.recv(1 << 20))
    assert [messages.decode_front(body) for body in bodies] == sent
    assert not link.wants_write


def test_many_messages_to_an_engine_that_reads_slowly_arrive_whole_and_in_order() -> None:
    link, engine = connected()
    sent = promotes(5 * MAX_VECTORS)
    reader, heard = messages.FrameReader(), []

    with link.held():
        for message in sent:
            link.send(message)
    num_reads = 0
    while len(heard) < len(sent) and num_reads < 10_000:
        num_reads += 1
        heard += [messages.decode_front(body) for body in reader.feed(engine.recv(777))]
        link.flush()

    assert heard == sent
    assert not link.wants_write


def test_an_error_while_messages_are_held_still_sends_them() -> None:
    link, engine = connected()
    (message,) = promotes(1)

    try:
        with link.held():
            link.send(message)
            raise RuntimeError("a bug")
    except RuntimeError:
        pass

    assert [messages.decode_front(body) for body in messages.FrameReader().feed(engine.recv(1 << 20))] == [message]


def test_what_was_held_for_an_engine_that_is_gone_goes_nowhere() -> None:
    link, engine = connected()
    with link.held():
        link.send(promotes(1)[0])
        link.detach()
    engine.close()

    assert not link.wants_write
