"""When a push over rdma is complete: with an agent that lands writes when it is told to, and a virtual clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from kvstore.transport.errors import RdmaError
from kvstore.transport.rdma_agent import MAX_DESCRIPTORS
from kvstore.transport.rdma_mover import WINDOW_BYTES, RdmaMover
from kvstore.transport.region import KVRegion
from kvstore.transport.transfers import Transfer, XferState

PEER = 1 << 40
LAYERS, LAYER_BYTES = 2, 4096
BLOCK = LAYERS * LAYER_BYTES


class VirtualClock:
    def __init__(self) -> None:
        self._now_s = 0.0

    def __call__(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        self._now_s += seconds


class FakeAgent:
    """Takes writes; `land` completes the oldest."""

    def __init__(self) -> None:
        self.posted: list[list[tuple[int, int, int]]] = []
        self.num_landed = 0
        self.is_destroyed = False

    def post(self, runs: Sequence[tuple[int, int, int]]) -> int:
        self.posted.append(list(runs))
        return len(self.posted) - 1

    def is_done(self, handle: int) -> bool:
        return handle < self.num_landed

    def destroy(self) -> None:
        self.is_destroyed = True


class FakePacer:
    def __init__(self) -> None:
        self.waits: list[float] = []

    def wake_in(self, seconds: float) -> None:
        self.waits.append(seconds)


@pytest.fixture
def region() -> Iterator[KVRegion]:
    region = KVRegion.create(8192, LAYERS, LAYER_BYTES)
    yield region
    region.close()


def _mover(region: KVRegion) -> tuple[RdmaMover, FakeAgent, FakePacer, VirtualClock]:
    agent, pacer, clock = FakeAgent(), FakePacer(), VirtualClock()
    fakes: dict[str, Any] = {"pacer": pacer, "clock": clock}
    return RdmaMover(agent, region, peer_address=PEER, stall_s=2.0, **fakes), agent, pacer, clock  # type: ignore[arg-type]


def _transfer(num_blocks: int) -> Transfer:
    transfer = Transfer("w:1", "r", 1, "t", num_blocks, 60.0, 60.0)
    transfer.dst_blocks = tuple(range(100, 100 + num_blocks))
    return transfer


def test_neighbours_in_both_regions_are_one_write(region: KVRegion) -> None:
    mover, agent, _, _ = _mover(region)

    moved = list(mover.move(_transfer(4), [(7, 0), (8, 1), (9, 3)], 0, LAYERS))

    assert sum(moved) == 3 * BLOCK
    assert agent.posted == [
        [
            (region.address + 7 * BLOCK, PEER + 100 * BLOCK, 2 * BLOCK),
            (region.address + 9 * BLOCK, PEER + 103 * BLOCK, BLOCK),
        ]
    ]


def test_layers_of_neighbours_are_not_joined(region: KVRegion) -> None:
    mover, agent, _, _ = _mover(region)

    list(mover.move(_transfer(2), [(7, 0), (8, 1)], 1, 2))

    assert agent.posted == [
        [
            (region.address + (7 + i) * BLOCK + LAYER_BYTES, PEER + (100 + i) * BLOCK + LAYER_BYTES, LAYER_BYTES)
            for i in range(2)
        ]
    ]


def test_a_call_has_at_most_1024_descriptors(region: KVRegion) -> None:
    mover, agent, _, _ = _mover(region)
    pairs = [(2 * i, i) for i in range(2500)]  # no two neighbours

    moved = list(mover.move(_transfer(2500), pairs, 0, 1))

    assert max(len(runs) for runs in agent.posted) <= MAX_DESCRIPTORS
    assert sum(len(runs) for runs in agent.posted) == 2500
    assert sum(moved) == 2500 * LAYER_BYTES


def test_commit_waits_until_the_last_write_has_landed(region: KVRegion) -> None:
    mover, agent, _, clock = _mover(region)
    transfer = _transfer(2)
    list(mover.move(transfer, [(0, 0)], 0, LAYERS))
    list(mover.move(transfer, [(5, 1)], 0, LAYERS))
    waiting = mover.finish(transfer)
    next(waiting)

    clock.advance(0.25)
    agent.num_landed = 1
    assert not mover.is_ready()
    assert mover.is_landing("w:1")
    clock.advance(0.25)
    agent.num_landed = 2
    assert mover.is_ready()

    assert next(waiting, "done") == "done"
    assert not mover.is_landing("w:1")
    assert transfer.busy_s == 0.5


def test_a_full_window_takes_no_more_until_something_lands(region: KVRegion) -> None:
    mover, agent, _, _ = _mover(region)
    transfer = _transfer(8000)
    slices = mover.move(transfer, [(i, i) for i in range(8000)], 0, LAYERS)

    moved = 0
    while mover.is_ready():
        moved += next(slices)

    assert moved == WINDOW_BYTES
    agent.num_landed = 1
    assert mover.is_ready()


def test_looks_become_rare_and_stop(region: KVRegion) -> None:
    mover, agent, pacer, clock = _mover(region)
    list(mover.move(_transfer(1), [(0, 0)], 0, LAYERS))
    pacer.waits.clear()

    for _ in range(3):
        clock.advance(0.0008)
        mover.is_ready()
    assert pacer.waits == pytest.approx([0.0002, 0.0004, 0.0006])
    clock.advance(1.0)
    mover.is_ready()
    assert pacer.waits[-1] == 0.001
    agent.num_landed = 1
    mover.is_ready()
    assert len(pacer.waits) == 4, "nothing is in flight"


def test_a_peer_on_which_nothing_lands_is_given_up(region: KVRegion) -> None:
    mover, _, _, clock = _mover(region)
    list(mover.move(_transfer(1), [(0, 0)], 0, LAYERS))
    clock.advance(1.9)
    mover.is_ready()
    clock.advance(0.1)

    with pytest.raises(RdmaError, match="nothing has landed") as caught:
        mover.is_ready()

    assert caught.value.reason.startswith("channel_lost")


def test_a_transfer_that_ended_gives_up_a_peer_before_its_end_is_two_tenths_of_a_second_late(region: KVRegion) -> None:
    """The worst case: something has landed just before the end, and nothing lands after it."""
    mover, agent, _, clock = _mover(region)
    transfer = _transfer(2)
    for place in range(2):
        list(mover.move(transfer, [(place, place)], 0, LAYERS))
    clock.advance(1.0)
    agent.num_landed = 1
    mover.is_ready()
    transfer.state = XferState.CLOSED
    clock.advance(0.1)
    mover.is_ready()
    clock.advance(0.09)

    with pytest.raises(RdmaError, match="nothing has landed"):
        mover.is_ready()


def test_close_destroys_the_agent_whatever_is_in_flight(region: KVRegion) -> None:
    mover, agent, _, _ = _mover(region)
    list(mover.move(_transfer(1), [(0, 0)], 0, LAYERS))

    mover.close()

    assert agent.is_destroyed
    assert not mover.is_landing("w:1")


def test_memory_that_a_device_may_still_copy_from_is_drained_behind_the_end_of_the_agent(
    region: KVRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    mover, agent, _, _ = _mover(region)
    seen: list[bool] = []
    monkeypatch.setattr(region, "drain", lambda: seen.append(agent.is_destroyed))
    list(mover.move(_transfer(1), [(0, 0)], 0, LAYERS))
    mover.close()
    assert seen == [True]
