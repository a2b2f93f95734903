"""Peers that are alive and slow on purpose: byte by byte, or not reading. They lose their link, nobody else does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvstore.transport import Arrived, BlocksFree, GrantReceived, PushFailed, ReserveRequested, Times
from kvstore.transport.frames import HEADER, MAGIC, VERSION, FrameType, data_frame, frame
from tests.contract.test_transport_bad_peers import RawWriter, good_data
from tests.contract.transport_helpers import End, granted, wait_for
from tests.contract.transport_peer import LAYER_BYTES, NUM_LAYERS
from tests.faults.proxy import Proxy

TIMES = Times(frame_grace_s=0.5, min_bytes_per_s=LAYER_BYTES * 4, handshake_s=0.6)
CLOSED_S = 20.0  # many times what any of these deadlines is, for a machine that has much else to do


@pytest.fixture
def end(tmp_path: Path) -> Iterator[End]:
    node = End("reader", str(tmp_path), ["tcp"], times=TIMES)
    yield node
    node.close()


def trickle(writer: RawWriter, data: bytes, *, every_s: float) -> float:
    """Send byte by byte until the other end closes, at most for `CLOSED_S`; seconds it took."""
    start_s = time.monotonic()
    writer.sock.settimeout(every_s)
    for byte in data:
        try:
            writer.sock.sendall(bytes([byte]))
            while writer.sock.recv(1 << 16):
                pass
            break
        except TimeoutError:
            pass
        except OSError:
            break
        assert time.monotonic() - start_s < CLOSED_S, "the slow link is still open"
    return time.monotonic() - start_s


def test_a_page_that_comes_byte_by_byte_costs_the_link_and_gives_the_blocks_back(end: End) -> None:
    writer = RawWriter(end).greet()
    grant = writer.reserve([3, 4])
    data = data_frame(good_data(grant), LAYER_BYTES) + bytes(LAYER_BYTES)
    writer.sock.sendall(data[:1000])
    trickle(writer, data[1000:], every_s=0.02)
    assert end.wait(BlocksFree).blocks == (3, 4)
    assert end.node.rejects() == {"too_slow": 1}


def test_a_heartbeat_byte_by_byte_is_no_heartbeat(end: End) -> None:
    writer = RawWriter(end).greet()
    trickle(writer, frame(FrameType.HEARTBEAT) * 9, every_s=0.1)
    assert end.node.rejects() == {"too_slow": 1}


def test_a_frame_that_stops_in_the_middle_costs_the_link(end: End) -> None:
    """While it is silent nothing can beat, so this is the rule of silence where that comes first."""
    writer = RawWriter(end).greet()
    writer.reserve([3])
    writer.sock.sendall(HEADER.pack(MAGIC, VERSION, FrameType.COMMIT, 0, 1000) + b"x")
    assert end.wait(BlocksFree).blocks == (3,)
    assert writer.is_closed()


def test_a_handshake_byte_by_byte_ends_in_time(end: End) -> None:
    writer = RawWriter(end)
    taken_s = trickle(writer, frame(FrameType.HEARTBEAT)[:8] * 100, every_s=0.1)
    assert taken_s >= 0.3
    assert end.node.rejects() != {}


def test_a_large_frame_may_take_the_time_of_its_size(tmp_path: Path) -> None:
    """Slower than the grace alone allows, faster than the least rate: 10 s, so that sleeps may be longer than asked."""
    page_bytes = NUM_LAYERS * LAYER_BYTES
    end = End("reader", str(tmp_path), ["tcp"], times=Times(frame_grace_s=0.5, min_bytes_per_s=page_bytes // 10))
    writer = RawWriter(end).greet()
    grant = writer.reserve([3])
    data = data_frame(good_data(grant, layer_hi=NUM_LAYERS), page_bytes) + bytes(page_bytes)
    for part in range(10):
        writer.sock.sendall(data[len(data) * part // 10 : len(data) * (part + 1) // 10])
        time.sleep(0.1)
    assert end.node.rejects() == {}
    assert end.node.grants()["LEASED"] == 1
    writer.sock.close()
    end.close()


def test_a_receiver_that_reads_byte_by_byte_loses_the_link(tmp_path: Path) -> None:
    """It beats, so it is not silent; but the frame that is half sent would never be through."""
    writer = End("writer", str(tmp_path), ["tcp"], times=TIMES)
    reader = End("reader", str(tmp_path), ["tcp"])
    try:
        with Proxy(reader.address.tcp_port) as slow:
            writer.reserve(msgspec.structs.replace(reader.address, tcp_port=slow.port), "w:1", 8)
            reader.node.grant(reader.wait(ReserveRequested), list(range(8)))
            writer.wait(GrantReceived)
            slow.to_receiver.bytes_per_s = 1000
            for _ in range(10):
                writer.node.push("w:1", [(place, place) for place in range(8)], 0, NUM_LAYERS)
            writer.wait(PushFailed, timeout_s=20)
            wait_for(writer.node.rejects, what="a cause")
            assert writer.node.rejects() == {"too_slow": 1}
    finally:
        writer.close()
        reader.close()


def test_other_links_go_on_beside_a_slow_one(end: End, tmp_path: Path) -> None:
    slow = RawWriter(end).greet()
    slow.sock.sendall(frame(FrameType.HEARTBEAT)[:3])
    other = End("other", str(tmp_path), ["tcp"])
    try:
        granted(other, end, "w:1", [1])
        other.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
        other.node.commit("w:1", src_blocks=[0], num_tokens=32, state=b"")
        end.wait(Arrived)
    finally:
        other.close()
        slow.sock.close()
