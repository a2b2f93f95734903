"""How a writer reaches a receiver: shared memory where it can, else tcp at the address that the receiver tells."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from kvstore.address import KVAddress
from kvstore.transport import Arrived, GrantReceived, GrantRefused, KVNode, KVRegion, ReserveRequested
from tests.contract.transport_helpers import End, fill, granted
from tests.contract.transport_peer import COMPAT, LAYER_BYTES, NUM_BLOCKS, NUM_LAYERS, SECRET


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[End, End]]:
    with contextlib.ExitStack() as stack:
        ends = [End(name, str(tmp_path), ["shm", "tcp"]) for name in ("writer", "reader")]
        for end in ends:
            stack.callback(end.close)
        fill(ends[0].region)
        yield ends[0], ends[1]


def _push(writer: End, reader: End) -> None:
    """One block from end to end."""
    granted(writer, reader, "w:1", [5])
    writer.node.push("w:1", [(3, 0)], 0, NUM_LAYERS)
    writer.node.commit("w:1", src_blocks=[3], num_tokens=1, state=b"")
    reader.wait(Arrived)
    assert reader.region.block(5) == writer.region.block(3)


def test_shared_memory_is_taken_first(pair: tuple[End, End]) -> None:
    writer, reader = pair

    _push(writer, reader)

    assert writer.node.counters().get("links_shm") == 1
    assert "links_tcp" not in writer.node.counters()


def _no_socket(reader: End, tmp_path: Path) -> KVAddress:  # noqa: ARG001
    """Its run folder was swept."""
    Path(reader.address.unix_path).unlink()
    return reader.address


def _dead_socket(reader: End, tmp_path: Path) -> KVAddress:
    """A socket file that nobody listens on."""
    path = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    return msgspec.structs.replace(reader.address, unix_path=str(path))


def _other_host(reader: End, tmp_path: Path) -> KVAddress:  # noqa: ARG001
    return msgspec.structs.replace(reader.address, host_id="another host")


@pytest.mark.parametrize("spoil", [_no_socket, _dead_socket, _other_host])
def test_without_shared_memory_the_pair_falls_back_to_tcp(
    pair: tuple[End, End], tmp_path: Path, spoil: Callable[[End, Path], KVAddress]
) -> None:
    writer, reader = pair
    reader.address = spoil(reader, tmp_path)

    _push(writer, reader)

    assert writer.node.counters().get("links_tcp") == 1
    assert "links_shm" not in writer.node.counters()


def test_a_receiver_that_cannot_be_reached_at_all_refuses_by_name(pair: tuple[End, End]) -> None:
    writer, reader = pair
    reader.close()

    writer.reserve(reader.address, "w:1", 1)

    assert writer.wait(GrantRefused).reason == "unreachable"


@pytest.mark.parametrize(("advertise", "told"), [("127.0.0.1", "127.0.0.1"), ("", "0.0.0.0")])
def test_peers_are_told_the_advertised_host(advertise: str, told: str) -> None:
    node = _node(bind="0.0.0.0", advertise=advertise)
    try:
        assert node.start().tcp_host == told
    finally:
        node.stop()


def test_a_name_is_advertised_as_the_address_that_it_has_here(pair: tuple[End, End]) -> None:
    writer, _ = pair
    node = _node(bind="127.0.0.1", advertise="localhost")
    try:
        address = node.start()
        assert address.tcp_host in ("127.0.0.1", "::1")
        writer.reserve(msgspec.structs.replace(address, tcp_host="127.0.0.1"), "w:1", 1)
        while not (asked := [event for event in node.poll_events() if isinstance(event, ReserveRequested)]):
            assert not writer.sees(GrantRefused, within_s=0.05)
        node.grant(asked[0], [0])
        writer.wait(GrantReceived)
    finally:
        node.stop()


def _node(*, bind: str, advertise: str) -> KVNode:
    return KVNode(
        incarnation="advertised",
        region=KVRegion.create(NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES),
        secret=SECRET,
        compat=COMPAT,
        protocols=("tcp",),
        bind=bind,
        advertise=advertise,
    )
