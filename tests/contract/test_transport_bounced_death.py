"""Writers and receivers whose KV moves through a bounce region die, hang or close; every block and slot comes back."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.transport import BlocksFree, GrantReceived, PushFailed, ReserveRequested
from tests.contract.bounced_end import BouncedEnd
from tests.contract.test_transport_death import (
    NOTICED_S,
    protocol,
    test_a_commit_that_came_before_the_kill_still_arrives,
    test_a_writer_that_closes_gives_the_blocks_back_within_a_second,
    test_kill_mid_push_frees_the_blocks_at_once,
)
from tests.contract.transport_helpers import Child, wait_for
from tests.contract.transport_peer import NUM_LAYERS
from tests.stopwatch import Stopwatch

__all__ = [
    "protocol",
    "test_a_commit_that_came_before_the_kill_still_arrives",
    "test_a_writer_that_closes_gives_the_blocks_back_within_a_second",
    "test_kill_mid_push_frees_the_blocks_at_once",
]


@pytest.fixture
def end(protocol: str, tmp_path: Path) -> Iterator[BouncedEnd]:
    """Each test ends with every slot of it free."""
    end = BouncedEnd("here", str(tmp_path), [protocol])
    yield end
    end.bounced._slots.check_invariants()
    assert end.bounced._slots.num_free == end.bounced._slots.num_slots
    end.close()


@pytest.fixture
def writer(end: BouncedEnd, protocol: str, tmp_path: Path) -> Iterator[Child]:
    """A writer process that holds a grant of blocks 10..17 here and has pushed a part."""
    with Child("bounced-writer", protocol, str(tmp_path), end.address) as child:
        end.node.grant(end.wait(ReserveRequested, timeout_s=120), list(range(10, 18)))
        assert child.read_event() == "GrantReceived"
        yield child


def test_slots_of_a_silent_writer_are_not_given_to_another(end: BouncedEnd, writer: Child) -> None:
    """Quarantine holds slots as it holds blocks: the stopped writer may still write into them."""
    writer.signal(signal.SIGSTOP)
    held = set(end.bounced._landings.slots_in_use)
    assert not end.sees(BlocksFree, within_s=2.5)
    wait_for(lambda: end.node.grants()["QUARANTINED"] == 8, what="quarantine")
    assert set(end.bounced._landings.slots_in_use) == held
    assert end.bounced._slots.num_free == end.bounced._slots.num_slots - 8
    with Stopwatch() as watch:
        writer.signal(signal.SIGKILL)
        assert end.wait(BlocksFree).blocks == tuple(range(10, 18))
    watch.assert_within(NOTICED_S)


@pytest.mark.parametrize("way", ["killed", "closed"])
def test_a_receiver_that_is_gone_gives_the_writer_its_slots_back(
    end: BouncedEnd, protocol: str, tmp_path: Path, way: str
) -> None:
    with Child("bounced-receiver", protocol, str(tmp_path)) as child:
        end.reserve(child.address, "w:1", 4)
        end.wait(GrantReceived, timeout_s=120)
        for _ in range(50):
            end.node.push("w:1", [(place, place) for place in range(4)], 0, NUM_LAYERS)
        time.sleep(0.01)
        with Stopwatch() as watch:
            if way == "killed":
                child.signal(signal.SIGKILL)
            else:
                child.tell("")
            assert end.wait(PushFailed).reason.startswith("channel_lost")
        watch.assert_within(NOTICED_S)
        assert end.bounced._pushes.slots_in_use == []
