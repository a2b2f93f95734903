"""A receiver that stalls: its transfers fail at their deadline, and it does not hold the pages that they read."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvstore.transport import Arrived, BlocksFree, GrantReceived, PushFailed, ReserveRequested
from kvstore.transport.tls import TlsFiles
from tests.certificates import Ca, needs_openssl
from tests.contract.transport_helpers import End, fill
from tests.contract.transport_peer import NUM_LAYERS
from tests.faults.proxy import Proxy
from tests.stopwatch import Stopwatch

LATE_S = 0.2  # at most so long after the deadline
PAIRS = [(place, place) for place in range(16)]
Stalled = tuple[End, End, Proxy, float]


@pytest.fixture(params=["plain", pytest.param("tls", marks=needs_openssl)])
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> TlsFiles | None:
    return Ca(tmp_path).sign("node") if request.param == "tls" else None


@pytest.fixture
def stalled(tmp_path: Path, tls: TlsFiles | None) -> Iterator[Stalled]:
    """A writer in the middle of a push to a receiver that reads no more, and when it asked for the grant: for 1 s."""
    with contextlib.ExitStack() as stack:
        writer, reader = (End(name, str(tmp_path), ["tcp"], tls=tls) for name in ("writer", "reader"))
        stack.callback(reader.close)
        stack.callback(writer.close)
        fill(writer.region)
        proxy = stack.enter_context(Proxy(reader.address.tcp_port))
        address = msgspec.structs.replace(reader.address, tcp_port=proxy.port)
        asked_s = time.monotonic()
        writer.reserve(address, "w:1", 16, deadline_s=1.0)
        reader.node.grant(reader.wait(ReserveRequested), list(range(16)))
        writer.wait(GrantReceived)
        proxy.to_receiver.is_held = True
        for _ in range(20):
            writer.node.push("w:1", PAIRS, 0, NUM_LAYERS)
        yield writer, reader, proxy, asked_s


def test_a_stalled_transfer_fails_at_its_deadline(stalled: Stalled) -> None:
    writer, _, _, asked_s = stalled
    with Stopwatch() as watch:
        failed = writer.wait(PushFailed)
    assert failed.reason == "deadline"
    assert time.monotonic() - asked_s >= 1.0
    watch.assert_within(1.0 + LATE_S)


def test_what_goes_on_after_a_stall_is_what_was_pushed(stalled: Stalled) -> None:
    """The half-sent frame is finished from a copy: the page is another sequence's by then, and the link is whole."""
    writer, reader, proxy, _ = stalled
    writer.wait(PushFailed)
    right = bytes(writer.region.buffer)
    writer.region.buffer[:] = bytes(len(right))
    proxy.to_receiver.is_held = False
    reader.wait(BlocksFree)
    landed = bytes(reader.region.buffer[: 16 * reader.region.block_bytes])
    for offset in range(0, len(landed), 4096):
        assert landed[offset : offset + 4096] in (right[offset : offset + 4096], bytes(4096))
    assert any(landed), "nothing was on its way"
    assert reader.node.rejects() == {}
    fill(writer.region)
    address = msgspec.structs.replace(reader.address, tcp_port=proxy.port)
    writer.reserve(address, "w:2", 1)
    reader.node.grant(reader.wait(ReserveRequested), [20])
    writer.wait(GrantReceived)
    writer.node.push("w:2", [(0, 0)], 0, NUM_LAYERS)
    writer.node.commit("w:2", src_blocks=[0], num_tokens=1, state=b"")
    reader.wait(Arrived)
    assert reader.region.block(20) == writer.region.block(0)
    assert writer.node.counters()["links_tcp"] == 1, "it was not the same link"
