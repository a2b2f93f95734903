"""The tests of every transport once more, over tcp with TLS."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvstore.transport import Arrived, BlocksFree, PushFailed
from tests.certificates import Ca, needs_openssl
from tests.contract.test_transport import *  # noqa: F403  (all tests there, whatever they are called)
from tests.contract.test_transport import MakeEnd
from tests.contract.transport_helpers import End, granted
from tests.contract.transport_peer import NUM_LAYERS
from tests.faults.proxy import Proxy

pytestmark = needs_openssl


@pytest.fixture
def protocol() -> str:
    return "tcp"


@pytest.fixture
def make_end(tmp_path: Path) -> Iterator[MakeEnd]:
    files = Ca(tmp_path).sign("node")
    with contextlib.ExitStack() as stack:

        def make(name: str, **options: object) -> End:
            end = End(name, str(tmp_path), ["tcp"], tls=files, **options)  # type: ignore[arg-type]
            stack.callback(end.close)
            return end

        yield make


def test_a_bit_that_flips_between_copy_and_check_never_arrives(pair: tuple[End, End]) -> None:
    """In place of the test of this name: TLS itself notices, and the link ends."""
    writer, reader = pair
    with Proxy(reader.address.tcp_port) as proxy:
        reader.address = msgspec.structs.replace(reader.address, tcp_port=proxy.port)
        granted(writer, reader, "w:1", [1])
        proxy.to_receiver.edit = flip_last_bit
        writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
        writer.node.commit("w:1", src_blocks=[0], num_tokens=32, state=b"")
        assert writer.wait(PushFailed).reason.startswith("channel_lost")
        assert reader.wait(BlocksFree).blocks == (1,)
        assert not reader.sees(Arrived, within_s=0.1)


def flip_last_bit(piece: bytes) -> bytes:
    return piece[:-1] + bytes([piece[-1] ^ 1])
