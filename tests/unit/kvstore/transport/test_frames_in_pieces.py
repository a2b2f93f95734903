"""Frames come out of a connection whole and in order, however the stream was cut into pieces."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import pytest

from kvstore.transport.connection import Connection
from kvstore.transport.errors import BadFrame
from kvstore.transport.frames import DataHeader, FrameType, HandedBody, Renew, data_frame, frame

Ends = tuple[socket.socket, Connection]
SEED = 11


class Pages:
    """Takes every DATA frame; keeps what landed."""

    def __init__(self) -> None:
        self.landed: list[bytearray] = []

    def page_views(self, header: DataHeader, num_bytes: int) -> list[memoryview]:  # noqa: ARG002  (a PageSink's method)
        self.landed.append(bytearray(num_bytes))
        return [memoryview(self.landed[-1])]


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, theirs = socket.socketpair()
    connection = Connection(theirs, "tcp", 0.0)
    connection.is_greeting = False
    yield ours, connection
    ours.close()
    connection.close()


def _frames(rng: random.Random) -> tuple[list[tuple[FrameType, bytes]], list[bytes]]:
    """(type, bytes of the frame) of each, and the pages of the DATA frames among them."""
    found, pages = [], []
    for k in range(200):
        match rng.randrange(4):
            case 0:
                found.append((FrameType.HEARTBEAT, frame(FrameType.HEARTBEAT)))
            case 1:
                found.append((FrameType.HANDED, frame(FrameType.HANDED, HandedBody(f"w:{k}"))))
            case 2:  # larger than what is read ahead
                found.append((FrameType.RENEW, frame(FrameType.RENEW, Renew([f"w:{i}" for i in range(900)]))))
            case _:
                pages.append(rng.randbytes(rng.choice([1, 100, 5000])))
                header = data_frame(DataHeader(1, 1, 0, 1, 0, 1), len(pages[-1]))
                found.append((FrameType.DATA, header + pages[-1]))
    return found, pages


@pytest.mark.parametrize("piece_bytes", [1, 7, 100, 4096, 1 << 20])
def test_the_cuts_of_a_stream_do_not_show(ends: Ends, piece_bytes: int) -> None:
    sock, connection = ends
    sent, pages = _frames(random.Random(SEED))
    stream, sink, got = b"".join(raw for _, raw in sent), Pages(), []
    at = 0
    while at < len(stream):
        at += sock.send(stream[at : at + min(piece_bytes, 32 << 10)])
        for _ in range(2):  # after a short read it does not ask the kernel again in the same turn
            got += [
                (kind, bytes(body) if isinstance(body, bytearray) else b"") for kind, body in connection.read(sink, 0)
            ]

    assert [kind for kind, _ in got] == [kind for kind, _ in sent]
    bodies = [raw[12:] for kind, raw in sent if kind is not FrameType.DATA]
    assert [body for kind, body in got if kind is not FrameType.DATA] == bodies
    assert sink.landed == pages


def test_a_bad_header_behind_a_good_frame_is_refused_after_it(ends: Ends) -> None:
    sock, connection = ends
    sock.sendall(frame(FrameType.HEARTBEAT) + b"NOPE" + bytes(8))
    frames = connection.read(Pages(), 0.0)

    assert next(frames)[0] is FrameType.HEARTBEAT
    with pytest.raises(BadFrame, match="bad_magic"):
        next(frames)


def test_a_frame_that_comes_byte_by_byte_has_a_start_to_measure_its_pace_from(ends: Ends) -> None:
    sock, connection = ends
    sock.sendall(frame(FrameType.HANDED, HandedBody("w:1"))[:5])
    assert not list(connection.read(Pages(), 1.0))

    with pytest.raises(BadFrame, match="too_slow"):
        connection.check_pace(10.0, grace_s=5.0, min_bytes_per_s=65536)
