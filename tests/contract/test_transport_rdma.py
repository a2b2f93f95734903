"""What is special about rdma: who takes it, what happens when it fails, and that no write lands after its fence.

The contract of all transports runs over it, too; here UCX moves bytes over tcp, `make test-rdma` does it with verbs.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from kvstore.transport import Arrived, BlocksFree, GrantReceived, GrantRefused, Handed, PushFailed, ReserveRequested
from kvstore.transport.rdma_agent import RdmaAgent
from tests.contract.transport_helpers import ROOT, Child, End, fill, granted, needs_nixl
from tests.contract.transport_peer import NUM_LAYERS

pytestmark = needs_nixl
MakePair = Callable[..., tuple[End, End]]


@pytest.fixture
def make_pair(tmp_path: Path) -> Iterator[MakePair]:
    with contextlib.ExitStack() as stack:

        def make(protocols: Sequence[str]) -> tuple[End, End]:
            """As on two hosts: shared memory is no way."""
            writer, reader = (End(name, str(tmp_path), protocols) for name in ("writer", "reader"))
            for end in (writer, reader):
                stack.callback(end.close)
            fill(writer.region)
            reader.address = msgspec.structs.replace(reader.address, host_id="another host")
            return writer, reader

        yield make


def _push(writer: End, reader: End, xfer: str) -> None:
    granted(writer, reader, xfer, [5])
    writer.node.push(xfer, [(3, 0)], 0, NUM_LAYERS)
    writer.node.commit(xfer, src_blocks=[3], num_tokens=1, state=b"")
    reader.wait(Arrived)
    assert reader.region.block(5) == writer.region.block(3)
    reader.node.settle(xfer, True)
    writer.wait(Handed)


def test_rdma_is_taken_before_tcp(make_pair: MakePair) -> None:
    writer, reader = make_pair(["shm", "rdma", "tcp"])

    _push(writer, reader, "w:1")

    assert writer.node.counters().get("links_rdma") == 1
    assert "links_tcp" not in writer.node.counters()


@pytest.mark.parametrize("version", ["", "nixl-cu12 0.9.0"])
def test_a_peer_with_another_nixl_or_none_gets_tcp_and_one_line_says_so(
    make_pair: MakePair, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    writer, reader = make_pair(["rdma", "tcp"])
    reader.address = msgspec.structs.replace(reader.address, rdma_version=version)

    with caplog.at_level(logging.WARNING, logger="kvstore"):
        _push(writer, reader, "w:1")
        _push(writer, reader, "w:2")

    assert writer.node.counters().get("links_tcp") == 1
    assert writer.node.counters().get("rdma_fallbacks") == 1
    (line,) = caplog.messages
    assert "no rdma to reader, tcp is used" in line
    assert version in line


def test_where_rdma_is_forced_a_peer_without_it_is_refused_by_name(make_pair: MakePair) -> None:
    writer, reader = make_pair(["rdma"])
    reader.address = msgspec.structs.replace(reader.address, rdma_version="nixl-cu12 0.9.0")

    writer.reserve(reader.address, "w:1", 1)

    reason = writer.wait(GrantRefused).reason
    assert reason.startswith("no_rdma: this worker has nixl-cu12 ")
    assert reason.endswith("the peer has nixl-cu12 0.9.0")


@pytest.mark.parametrize(("num_kept", "added"), [(0, b""), (100, b""), (0, b"?" * 300)])
def test_metadata_that_cannot_be_read_makes_the_pair_use_tcp(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch, num_kept: int, added: bytes
) -> None:
    writer, reader = make_pair(["rdma", "tcp"])
    node = reader.node._context.rdma
    assert node is not None
    take_agent = node.take_agent

    def spoiled() -> RdmaAgent:
        agent = take_agent()
        agent.metadata = agent.metadata[:num_kept] + added
        return agent

    monkeypatch.setattr(node, "take_agent", spoiled)

    _push(writer, reader, "w:1")

    assert writer.node.counters().get("links_tcp") == 1


def _break_links(reader: End) -> None:
    for link in list(reader.node._receiver._links.values()):
        assert link._agent is not None
        link._agent.destroy()


def test_a_link_whose_writes_fail_is_lost_and_the_second_time_the_pair_uses_tcp(make_pair: MakePair) -> None:
    """The queue pair breaks while the control connection lives: the same answer comes over another way."""
    writer, reader = make_pair(["rdma", "tcp"])
    for xfer in ("w:1", "w:2"):
        granted(writer, reader, xfer, [5])
        _break_links(reader)
        writer.node.push(xfer, [(3, 0)], 0, NUM_LAYERS)
        assert writer.wait(PushFailed).reason.startswith("channel_lost: rdma")
        assert reader.wait(BlocksFree).blocks == (5,)
        time.sleep(0.3)  # the writer does not dial again at once

    _push(writer, reader, "w:3")

    counters = writer.node.counters()
    assert (counters.get("links_rdma"), counters.get("rdma_failures"), counters.get("links_tcp")) == (2, 2, 1)


def _stays(reader: End, blocks: Sequence[int], *, for_s: float) -> bool:
    """Nothing is written into these pages for a while."""
    for block in blocks:
        reader.region.block(block)[:] = bytes(reader.region.block_bytes)
    time.sleep(for_s)
    return not any(any(reader.region.block(block)) for block in blocks)


def test_nothing_of_an_abandoned_push_lands_after_its_pages_came_back(make_pair: MakePair) -> None:
    writer, reader = make_pair(["rdma"])
    for i in range(5):
        granted(writer, reader, f"w:{i}", [1, 2, 3, 4])
        for _ in range(200):
            writer.node.push(f"w:{i}", [(place, place) for place in range(4)], 0, NUM_LAYERS)
        time.sleep(0.01)
        writer.node.abandon(f"w:{i}")
        assert reader.wait(BlocksFree).blocks == (1, 2, 3, 4)
        assert _stays(reader, [1, 2, 3, 4], for_s=0.1)


def test_nothing_of_a_killed_writer_lands_after_its_pages_came_back(tmp_path: Path) -> None:
    end = End("here", str(tmp_path), ["rdma"])
    try:
        with Child("writer", "rdma", str(tmp_path), end.address) as child:
            end.node.grant(end.wait(ReserveRequested, timeout_s=120), list(range(10, 18)))
            assert child.read_event() == "GrantReceived"
            child.tell("push")
            time.sleep(0.1)
            child.signal(signal.SIGKILL)
            assert end.wait(BlocksFree).blocks == tuple(range(10, 18))
            assert _stays(end, range(10, 18), for_s=0.5)
    finally:
        end.close()


def test_nothing_lands_in_a_receiver_that_was_stopped_after_it_has_closed_the_link(tmp_path: Path) -> None:
    """The writer gives up a peer that is stopped; what waits in sockets must not land when that peer wakes."""
    end = End("here", str(tmp_path), ["rdma"])
    try:
        with Child("receiver", "rdma", str(tmp_path)) as child:
            end.reserve(child.address, "w:1", 4)
            end.wait(GrantReceived)
            child.signal(signal.SIGSTOP)
            for _ in range(40):
                end.node.push("w:1", [(place, place) for place in range(4)], 0, NUM_LAYERS)
            end.wait(PushFailed)
            end.region.buffer[:] = bytes(end.region.num_bytes)  # ours again: nobody reads it any more
            child.signal(signal.SIGCONT)
            assert child.read_event() == "ReserveRequested"
            assert child.read_event() == "BlocksFree"
    finally:
        end.close()


def test_an_open_link_without_transfers_costs_no_cpu(make_pair: MakePair) -> None:
    writer, reader = make_pair(["rdma"])
    _push(writer, reader, "w:1")

    before_s = time.process_time()
    time.sleep(1.0)

    assert time.process_time() - before_s < 0.2, "some thread spins"


def test_a_process_that_has_used_rdma_ends_without_a_crash_and_without_torch() -> None:
    code = (
        "import sys\n"
        "from kvstore.transport import KVNode, KVRegion\n"
        "node = KVNode(incarnation='a', region=KVRegion.create(4, 1, 4096), secret=b's', compat='c', "
        "protocols=('rdma',))\n"
        "node.start()\nnode.stop()\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
