from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import pytest

from kvstore.transport.wire import AHEAD_BYTES, PlainWire


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, PlainWire]]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    yield ours, PlainWire(theirs)
    ours.close()
    theirs.close()


def test_bytes_come_in_order_whatever_sizes_are_asked_for(ends: tuple[socket.socket, PlainWire]) -> None:
    sock, wire = ends
    rng = random.Random(3)
    sent, got = rng.randbytes(100_000), bytearray()
    sock.sendall(sent)
    while len(got) < len(sent):
        sizes = [rng.choice([1, 12, 300, AHEAD_BYTES, 9000]) for _ in range(rng.choice([1, 1, 3]))]
        buffers = [bytearray(size) for size in sizes]
        try:
            num_bytes = wire.receive([memoryview(buffer) for buffer in buffers])
        except BlockingIOError:
            continue
        got += b"".join(buffers)[:num_bytes]

    assert bytes(got) == sent
    assert wire.num_buffered_bytes == 0


def test_what_was_read_ahead_is_told_and_comes_before_the_end(ends: tuple[socket.socket, PlainWire]) -> None:
    sock, wire = ends
    sock.sendall(b"header" + b"body")
    sock.close()
    header, body = bytearray(6), bytearray(4)

    assert wire.receive([memoryview(header)]) == 6
    assert wire.num_buffered_bytes == 4
    assert wire.receive([memoryview(body)]) == 4
    assert (header, body) == (b"header", b"body")
    with pytest.raises(BlockingIOError):  # without asking the kernel again
        wire.receive([memoryview(header)])
    assert wire.receive([memoryview(header)]) == 0
