"""Writers and receivers whose KV rdma moves by its addresses die, hang or close; every block comes back in time."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.transport import BlocksFree, GrantReceived, PushFailed, ReserveRequested, Times
from tests.contract.direct_end import DirectEnd
from tests.contract.test_transport_death import (
    test_a_commit_that_came_before_the_kill_still_arrives,
    test_a_stopped_receiver_fails_the_push_after_two_seconds,
    test_a_stopped_writer_is_quarantined_then_fenced_when_it_wakes,
    test_a_transfer_whose_receiver_has_stopped_fails_at_its_deadline,
    test_a_writer_that_closes_gives_the_blocks_back_within_a_second,
    test_kill_mid_push_frees_the_blocks_at_once,
    test_kill_of_a_quarantined_writer_is_the_proof,
)
from tests.contract.transport_helpers import Child, needs_nixl

__all__ = [
    "test_a_commit_that_came_before_the_kill_still_arrives",
    "test_a_stopped_receiver_fails_the_push_after_two_seconds",
    "test_a_stopped_writer_is_quarantined_then_fenced_when_it_wakes",
    "test_a_transfer_whose_receiver_has_stopped_fails_at_its_deadline",
    "test_a_writer_that_closes_gives_the_blocks_back_within_a_second",
    "test_kill_mid_push_frees_the_blocks_at_once",
    "test_kill_of_a_quarantined_writer_is_the_proof",
]

pytestmark = needs_nixl
SHORT = Times(tcp_silence_s=2.5)


@pytest.fixture
def protocol() -> str:
    return "rdma"


@pytest.fixture
def end(tmp_path: Path) -> Iterator[DirectEnd]:
    end = DirectEnd("here", str(tmp_path))
    yield end
    end.close()


@pytest.fixture
def writer(end: DirectEnd, tmp_path: Path) -> Iterator[Child]:
    """A writer process that holds a grant of blocks 10..17 here and has pushed a part."""
    with Child("direct-writer", "rdma", str(tmp_path), end.address) as child:
        end.node.grant(end.wait(ReserveRequested, timeout_s=120), list(range(10, 18)))
        assert child.read_event() == "GrantReceived"
        yield child


@pytest.mark.parametrize("is_proof", [True, False])
def test_silence_ends_a_link_only_where_our_end_is_the_proof(tmp_path: Path, is_proof: bool) -> None:
    """As over cuda_ipc, where a writer has mapped our pages: then only the end of its process frees them."""
    end = DirectEnd("here", str(tmp_path), times=SHORT)
    assert end.inner._context.rdma is not None
    end.inner._context.rdma.is_proof = is_proof
    try:
        with Child("direct-writer", "rdma", str(tmp_path), end.address) as child:
            end.node.grant(end.wait(ReserveRequested, timeout_s=120), list(range(10, 18)))
            assert child.read_event() == "GrantReceived"
            child.signal(signal.SIGSTOP)
            if not is_proof:
                assert not end.sees(BlocksFree, within_s=4.0)
                assert end.node.grants()["QUARANTINED"] == 8
                child.signal(signal.SIGKILL)
            assert end.wait(BlocksFree).blocks == tuple(range(10, 18))
            end.node.check_invariants()
    finally:
        end.close()


def test_a_writer_that_could_still_copy_keeps_its_pages_after_a_bad_frame(tmp_path: Path) -> None:
    """Its link drains until it closes its end."""
    end, writer = DirectEnd("here", str(tmp_path)), DirectEnd("writer", str(tmp_path))
    assert end.inner._context.rdma is not None
    end.inner._context.rdma.is_proof = False
    try:
        writer.reserve(end.address, "w:1", 2)
        end.node.grant(end.wait(ReserveRequested), [1, 2])
        writer.wait(GrantReceived)
        release = writer.hold_kv_thread()  # it reads nothing, so it does not close its end
        (link,) = writer.inner._writer._links.values()
        assert link._connection is not None
        link._connection._sock.send(b"nonsense, and enough of it to be a header")
        assert not end.sees(BlocksFree, within_s=1.0)
        assert end.node.grants()["QUARANTINED"] == 2
        release()
        assert writer.wait(PushFailed).reason.startswith("channel_lost")
        assert end.wait(BlocksFree).blocks == (1, 2)
    finally:
        writer.close()
        end.close()
