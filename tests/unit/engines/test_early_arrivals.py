"""KV that has arrived is told by the kv thread, whatever the engine thread is at."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from engines import messages
from engines.dry_runs import DRY_RUN_RID
from engines.early_arrivals import EarlyArrivals
from engines.handoff_reader import HandoffReader
from engines.messages import EngineMessage
from engines.params import SamplingParams
from engines.transfer_state import TransferState, encode_state
from kvstore import transport as kv
from kvstore.blocks import BlockPool
from kvstore.clock import VirtualClock

STATE = encode_state(TransferState([1, 2, 3, 4, 5], [[9]], SamplingParams(max_tokens=4), 0, 60.0))


class Rig:
    """A reader over a node that only writes down what it is told. `is_full`: the socket to the front takes nothing."""

    def __init__(self) -> None:
        self.told: list[tuple[str, EngineMessage]] = []
        self.asked: list[tuple[Any, ...]] = []
        self.is_full = False
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.reader = HandoffReader(
            node=self,  # type: ignore[arg-type]
            pool=BlockPool(16),
            block_size=4,
            send=lambda message: self.told.append(("engine", message)),
            may_admit=lambda _blocks, _expected: True,
            copy_blocks=lambda _pairs: None,
            clock=VirtualClock(10.0),
        )
        self.early = EarlyArrivals(self.reader, self._post, wake_fd=self.wake_fd)

    def _post(self, message: EngineMessage) -> bool:
        self.told.append((threading.current_thread().name, message))
        return not self.is_full

    def grant(self, event: kv.ReserveRequested, blocks: list[int] | None, reason: str = "") -> None:  # noqa: ARG002
        self.asked.append(("grant", event.xfer, [message for _, message in self.told], self.reader.expects(event.xfer)))

    def settle(self, xfer: str, handed: bool) -> None:
        self.asked.append(("settle", xfer, handed))

    def reserve(self, xfer: str = "x", rid: str = "r") -> None:
        self.reader.on_reserve(kv.ReserveRequested(xfer, rid, 2, "p.1", 2))

    def arrive(self, xfer: str = "x", rid: str = "r", state: bytes = STATE) -> bool:
        """In the kv thread, as the node does it. True: the engine thread hears nothing of it."""
        event = kv.Arrived(xfer, rid, 2, "p.1", (0, 1), 5, state, 100, 0.001, 9.5)
        taken: list[bool] = []
        thread = threading.Thread(target=lambda: taken.append(self.early.takes(event)), name="kv")
        thread.start()
        thread.join(10)
        return taken == [True]


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    os.close(rig.wake_fd)


def test_arrival_is_told_by_the_kv_thread_and_promoted_without_the_engine_thread_hearing_of_it(rig: Rig) -> None:
    rig.reserve()

    assert rig.arrive()

    assert [(who, type(said)) for who, said in rig.told] == [("engine", messages.Incoming), ("kv", messages.Arrived)]
    (sequence,) = rig.reader.promote("r", "x", 3)
    assert (sequence.rid, sequence.block_table, sequence.epoch) == ("r", [0, 1], 3)
    assert rig.asked[-1] == ("settle", "x", True)
    assert rig.reader.num_expected == 0


def test_front_knows_of_a_transfer_before_anything_can_arrive(rig: Rig) -> None:
    rig.reserve()

    ((_, _, told, is_expected),) = rig.asked
    assert told == [messages.Incoming("r", "x")]
    assert is_expected


def test_arrival_that_the_front_refuses_is_settled_like_any_other(rig: Rig) -> None:
    rig.reserve()
    rig.arrive()

    rig.reader.refuse("r", "x")

    assert rig.asked[-1] == ("settle", "x", False)
    assert rig.reader.promote("r", "x", 3) == []


def test_arrival_whose_blocks_are_lost_is_gone_for_a_late_promote(rig: Rig) -> None:
    rig.reserve()
    rig.arrive()

    rig.reader.on_blocks_free(kv.BlocksFree((), "x"))

    assert rig.reader.promote("r", "x", 3) == []


@pytest.mark.parametrize("rid", [DRY_RUN_RID, "stranger"])
def test_what_was_promised_to_no_request_is_left_to_the_engine_thread(rig: Rig, rid: str) -> None:
    if rid == DRY_RUN_RID:
        rig.reserve(rid=rid)

    assert not rig.arrive(rid=rid)
    assert rig.told == []


def test_state_that_cannot_be_read_is_left_to_the_engine_thread(rig: Rig) -> None:
    rig.reserve()

    assert not rig.arrive(state=b"\xc1")
    assert rig.reader.expects("x"), "nothing was kept of it"


def test_second_arrival_of_a_transfer_is_not_told_again(rig: Rig) -> None:
    rig.reserve()

    assert [rig.arrive(), rig.arrive()] == [True, False]
    assert len(rig.told) == 2


def test_other_events_are_the_engine_threads(rig: Rig) -> None:
    rig.reserve()

    assert not rig.early.takes(kv.BlocksFree((0, 1), "x"))
    assert not rig.early.takes(kv.Handed("x"))


def test_engine_is_woken_only_for_what_the_socket_did_not_take(rig: Rig) -> None:
    rig.reserve("x1")
    rig.reserve("x2")

    rig.arrive("x1")
    with pytest.raises(BlockingIOError):
        os.eventfd_read(rig.wake_fd)

    rig.is_full = True
    assert rig.arrive("x2")
    assert os.eventfd_read(rig.wake_fd) == 1
