"""A long line, by a relay that holds each piece back: slower, and right. Needs no root."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from kvstore.transport import Arrived, GrantReceived, Handed, ReserveRequested
from tests.contract.transport_helpers import End, fill
from tests.contract.transport_peer import NUM_LAYERS
from tests.faults.proxy import Proxy

DELAY_S = 0.1


def test_pages_are_right_over_a_line_with_a_long_way_and_little_room(tmp_path: Path) -> None:
    writer, reader = End("writer", str(tmp_path), ["tcp"]), End("reader", str(tmp_path), ["tcp"])
    try:
        fill(writer.region)
        with Proxy(reader.address.tcp_port) as proxy:
            for way in (proxy.to_receiver, proxy.to_writer):
                way.delay_s, way.bytes_per_s = DELAY_S, 4e6
            start_s = time.monotonic()
            address = msgspec.structs.replace(reader.address, tcp_port=proxy.port)
            writer.reserve(address, "w:1", 8)
            reader.node.grant(reader.wait(ReserveRequested), list(range(8)))
            writer.wait(GrantReceived)
            writer.node.push("w:1", [(place, place) for place in range(8)], 0, NUM_LAYERS)
            writer.node.commit("w:1", src_blocks=list(range(8)), num_tokens=8, state=b"")
            reader.wait(Arrived)
            reader.node.settle("w:1", True)
            writer.wait(Handed)
            taken_s = time.monotonic() - start_s
        size = 8 * reader.region.block_bytes
        assert reader.region.buffer[:size] == writer.region.buffer[:size]
        assert taken_s > 6 * DELAY_S + size / 4e6 / 2, "the relay held nothing back"
        assert reader.node.rejects() == writer.node.rejects() == {}
    finally:
        writer.close()
        reader.close()
