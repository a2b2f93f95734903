"""A second process dies, hangs or comes back, at the worst moments. No page is freed before the proof."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.transport import Arrived, BlocksFree, GrantReceived, PushFailed, ReserveRequested
from tests.contract.transport_helpers import PROTOCOLS, Child, End, wait_for
from tests.contract.transport_peer import NUM_LAYERS
from tests.stopwatch import Stopwatch

NOTICED_S, SILENCE_S, LATE_S = 1.0, 2.0, 0.2  # so long after a close or a death; a silence; a deadline


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def end(protocol: str, tmp_path: Path) -> Iterator[End]:
    node = End("here", str(tmp_path), [protocol])
    yield node
    node.close()


@pytest.fixture
def writer(end: End, protocol: str, tmp_path: Path) -> Iterator[Child]:
    """A writer process that holds a grant of blocks 10..17 here and has pushed a part."""
    with Child("writer", protocol, str(tmp_path), end.address) as child:
        end.node.grant(end.wait(ReserveRequested, timeout_s=120), list(range(10, 18)))
        assert child.read_event() == "GrantReceived"
        yield child


def test_kill_mid_push_frees_the_blocks_at_once(end: End, writer: Child) -> None:
    writer.tell("push")
    time.sleep(0.05)  # somewhere in the middle of 4 GB
    with Stopwatch() as watch:
        writer.signal(signal.SIGKILL)
        assert end.wait(BlocksFree).blocks == tuple(range(10, 18))
    watch.assert_within(NOTICED_S)
    assert sum(end.node.grants().values()) == 0
    end.node.check_invariants()


def test_a_commit_that_came_before_the_kill_still_arrives(end: End, writer: Child) -> None:
    writer.tell("commit")
    assert end.wait(Arrived).num_tokens == 100
    writer.signal(signal.SIGKILL)
    assert not end.sees(BlocksFree, within_s=0.5)
    assert end.node.grants()["COMMITTED"] == 8
    end.node.settle("w:1", False)
    end.wait(BlocksFree)


def test_a_stopped_writer_is_quarantined_then_fenced_when_it_wakes(end: End, writer: Child) -> None:
    """Silence frees nothing; the writer's own word does."""
    writer.signal(signal.SIGSTOP)
    assert not end.sees(BlocksFree, within_s=5.5)
    wait_for(end.node.overdue_writers, what="a writer is overdue")
    assert end.node.grants() == {"LEASED": 0, "COMMITTED": 0, "QUARANTINED": 8}
    (overdue,) = end.node.overdue_writers()
    assert (overdue.xfer, overdue.num_blocks) == ("w:1", 8)
    writer.signal(signal.SIGCONT)
    assert writer.read_event() == "PushFailed"
    assert end.wait(BlocksFree).blocks == tuple(range(10, 18))


def test_kill_of_a_quarantined_writer_is_the_proof(end: End, writer: Child) -> None:
    writer.signal(signal.SIGSTOP)
    assert not end.sees(BlocksFree, within_s=2.5)
    with Stopwatch() as watch:
        writer.signal(signal.SIGKILL)
        end.wait(BlocksFree)
    watch.assert_within(NOTICED_S)


def test_a_writer_that_closes_gives_the_blocks_back_within_a_second(end: End, writer: Child) -> None:
    with Stopwatch() as watch:
        writer.tell("")
        assert end.wait(BlocksFree).blocks == tuple(range(10, 18))
    watch.assert_within(NOTICED_S)


@pytest.mark.parametrize("way", ["killed", "closed"])
def test_a_receiver_that_is_gone_fails_the_push_within_a_second(
    end: End, protocol: str, tmp_path: Path, way: str
) -> None:
    with Child("receiver", protocol, str(tmp_path)) as child:
        end.reserve(child.address, "w:1", 4)
        end.wait(GrantReceived)
        end.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
        with Stopwatch() as watch:
            if way == "killed":
                child.signal(signal.SIGKILL)
            else:
                child.tell("")
            assert end.wait(PushFailed).reason.startswith("channel_lost")
        watch.assert_within(NOTICED_S)


def test_a_transfer_whose_receiver_has_stopped_fails_at_its_deadline(end: End, protocol: str, tmp_path: Path) -> None:
    """Before the silence is long enough. Over rdma writes are under way, which nobody can call back."""
    with Child("receiver", protocol, str(tmp_path)) as child:
        end.reserve(child.address, "w:0", 4)  # the link stands
        end.wait(GrantReceived)
        with Stopwatch() as watch:
            end.reserve(child.address, "w:1", 4, deadline_s=1.0)
            end.wait(GrantReceived)
            child.signal(signal.SIGSTOP)
            for _ in range(40):
                end.node.push("w:1", [(place, place) for place in range(4)], 0, NUM_LAYERS)
            assert end.wait(PushFailed).reason == "deadline"
        assert watch.taken_s >= 1.0
        watch.assert_within(1.0 + LATE_S)


def test_a_stopped_receiver_fails_the_push_after_two_seconds(end: End, protocol: str, tmp_path: Path) -> None:
    """The writer closes the link, so the receiver frees when it wakes, and nothing was written meanwhile."""
    with Child("receiver", protocol, str(tmp_path)) as child:
        end.reserve(child.address, "w:1", 4)
        end.wait(GrantReceived)
        child.signal(signal.SIGSTOP)
        with Stopwatch() as watch:
            for _ in range(40):
                end.node.push("w:1", [(place, place) for place in range(4)], 0, NUM_LAYERS)
            reasons = ("silent", "channel_lost: rdma stalled")  # a write that nobody acknowledges says the same
            assert end.wait(PushFailed).reason in reasons
        assert watch.taken_s > 1.0
        watch.assert_within(SILENCE_S)
        child.signal(signal.SIGCONT)
        assert child.read_event() == "ReserveRequested"
        assert child.read_event() == "BlocksFree"
