"""Pages past 2^31 and 2^32 bytes of a region: copied, sent, hashed, addressed as near ones. The regions are sparse."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.transport import Arrived, KVNode, KVRegion, PushFailed
from tests.contract.transport_helpers import End, granted
from tests.contract.transport_peer import COMPAT, SECRET

NUM_LAYERS, LAYER_BYTES = 4, 64 << 10
NUM_BLOCKS = 17_000  # of 256 KiB: 4.15 GiB, of which the few pages of these blocks exist
OWN, GRANTED = [8191, 8192, 16_999], [16_998, 8192, 16_384]


class FarEnd(End):
    def __init__(self, name: str, run_dir: str, protocol: str) -> None:
        self.region = KVRegion.create(NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES)
        self.node = KVNode(
            incarnation=name,
            region=self.region,
            secret=SECRET,
            compat=COMPAT,
            protocols=(protocol,),
            run_dir=run_dir,
        )
        self.address = self.node.start()
        self.events, self._num_seen = [], 0


@pytest.fixture(params=["shm", "tcp"])
def far_pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[FarEnd, FarEnd]]:
    with contextlib.ExitStack() as stack:
        ends = [FarEnd(name, str(tmp_path), request.param) for name in ("writer", "reader")]
        for end in ends:
            stack.callback(end.region.close)
            stack.callback(end.close)
        for block in OWN:
            ends[0].region.block(block)[:] = os.urandom(NUM_LAYERS * LAYER_BYTES)
        yield ends[0], ends[1]


def test_far_pages_arrive_byte_for_byte(far_pair: tuple[FarEnd, FarEnd]) -> None:
    writer, reader = far_pair
    granted(writer, reader, "w:1", GRANTED)
    for layer in range(NUM_LAYERS):
        writer.node.push("w:1", [(block, place) for place, block in enumerate(OWN)], layer, layer + 1)
    writer.node.commit("w:1", src_blocks=OWN, num_tokens=90, state=b"")

    reader.wait(Arrived)
    for own, theirs in zip(OWN, GRANTED, strict=True):
        assert reader.region.block(theirs) == writer.region.block(own)
    num_written = os.fstat(reader.region.fd).st_blocks * 512
    assert num_written == len(GRANTED) * NUM_LAYERS * LAYER_BYTES, "something was written elsewhere"


def test_a_far_page_in_a_wrong_place_never_arrives(far_pair: tuple[FarEnd, FarEnd]) -> None:
    writer, reader = far_pair
    granted(writer, reader, "w:1", GRANTED)
    writer.node.push("w:1", [(8191, 0), (16_999, 1), (8192, 2)], 0, NUM_LAYERS)
    writer.node.commit("w:1", src_blocks=OWN, num_tokens=90, state=b"")
    assert writer.wait(PushFailed).reason == "checksum"
