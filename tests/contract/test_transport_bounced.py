"""Nodes whose KV moves through a bounce region keep the contract of transports, with each other and with others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.readable import wait_readable
from kvstore.transport import (
    Arrived,
    BlocksFree,
    Event,
    GrantReceived,
    GrantRefused,
    Handed,
    PushFailed,
    ReserveRequested,
    SourceFree,
)
from tests.contract.bounced_end import NUM_SLOTS, BouncedEnd
from tests.contract.test_transport import (
    MakeEnd,
    pair,
    protocol,
    test_a_cancel_by_the_receiver_fences_the_writer_first,
    test_a_commit_without_answer_is_given_up_and_its_blocks_stay_with_the_receiver,
    test_a_new_owner_of_the_address_is_not_written_to,
    test_a_pair_that_does_not_fit_is_refused_by_name,
    test_a_receiver_that_never_answers_a_reservation_is_given_up,
    test_a_refused_handoff_gives_the_blocks_back,
    test_a_repeated_commit_is_answered_again,
    test_a_stopped_receiver_node_fails_the_push_at_once,
    test_a_stopped_writer_node_is_proven_dead,
    test_abandon_before_the_grant_leaves_nothing,
    test_abandon_of_a_transfer_that_is_over_still_says_source_free,
    test_an_abandoned_transfer_frees_both_ends,
    test_an_address_nobody_listens_on_is_refused_and_then_backed_off,
    test_blocks_pushed_twice_and_out_of_order_arrive_as_they_were_last,
    test_many_transfers_share_a_link,
    test_pushed_blocks_arrive_byte_for_byte,
    test_the_deadline_ends_a_transfer_at_both_ends,
)
from tests.contract.transport_helpers import End, fill, granted
from tests.contract.transport_peer import NUM_BLOCKS, NUM_LAYERS

__all__ = [
    "pair",
    "protocol",
    "test_a_cancel_by_the_receiver_fences_the_writer_first",
    "test_a_commit_without_answer_is_given_up_and_its_blocks_stay_with_the_receiver",
    "test_a_new_owner_of_the_address_is_not_written_to",
    "test_a_pair_that_does_not_fit_is_refused_by_name",
    "test_a_receiver_that_never_answers_a_reservation_is_given_up",
    "test_a_refused_handoff_gives_the_blocks_back",
    "test_a_repeated_commit_is_answered_again",
    "test_a_stopped_receiver_node_fails_the_push_at_once",
    "test_a_stopped_writer_node_is_proven_dead",
    "test_abandon_before_the_grant_leaves_nothing",
    "test_abandon_of_a_transfer_that_is_over_still_says_source_free",
    "test_an_abandoned_transfer_frees_both_ends",
    "test_an_address_nobody_listens_on_is_refused_and_then_backed_off",
    "test_blocks_pushed_twice_and_out_of_order_arrive_as_they_were_last",
    "test_many_transfers_share_a_link",
    "test_pushed_blocks_arrive_byte_for_byte",
    "test_the_deadline_ends_a_transfer_at_both_ends",
]


@pytest.fixture(params=["both", "writer", "reader"])
def bounced_ends(request: pytest.FixtureRequest) -> str:
    """Which of the two has its KV apart."""
    return str(request.param)


@pytest.fixture
def make_end(protocol: str, bounced_ends: str, tmp_path: Path) -> Iterator[MakeEnd]:
    """Every test ends with all slots of each end accounted for."""
    with contextlib.ExitStack() as stack:

        def make(name: str, **options: object) -> End:
            kind = BouncedEnd if bounced_ends in ("both", name) else End
            end = kind(name, str(tmp_path), [protocol], **options)  # type: ignore[arg-type]
            stack.callback(end.close)
            if isinstance(end, BouncedEnd):
                stack.callback(end.bounced._slots.check_invariants)
            return end

        yield make


@contextlib.contextmanager
def bounced_pair(folder: Path, protocol: str, **options: int) -> Iterator[tuple[BouncedEnd, BouncedEnd]]:
    writer, reader = (BouncedEnd(name, str(folder), [protocol], **options) for name in ("writer", "reader"))  # type: ignore[arg-type]
    try:
        fill(writer.region)
        yield writer, reader
    finally:
        writer.close()
        reader.close()


@pytest.fixture
def two(protocol: str, tmp_path: Path) -> Iterator[tuple[BouncedEnd, BouncedEnd]]:
    with bounced_pair(tmp_path, protocol) as ends:
        yield ends


def hears(end: End, kind: type[Event], xfer: str) -> None:
    """Such an event comes, or has come, whatever came beside it."""
    ends_s = time.monotonic() + 10
    while not any(isinstance(event, kind) and event.xfer == xfer for event in end.events):
        left_s = ends_s - time.monotonic()
        assert left_s > 0, f"no {kind.__name__} of {xfer} within 10 s, but {end.events}"
        wait_readable([end.node.wake_fd], left_s)
        end.events += end.node.poll_events()


def num_slots_used(end: BouncedEnd) -> int:
    return end.bounced._slots.num_slots - end.bounced._slots.num_free


def test_slots_come_back_with_the_blocks(two: tuple[BouncedEnd, BouncedEnd]) -> None:
    writer, reader = two
    granted(writer, reader, "w:1", [5, 6, 7])
    assert (num_slots_used(writer), num_slots_used(reader)) == (0, 3), "a writer takes slots with its first push"
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
    assert num_slots_used(writer) == 3
    writer.node.commit("w:1", src_blocks=[0], num_tokens=32, state=b"")
    reader.wait(Arrived)
    reader.node.settle("w:1", True)
    assert num_slots_used(reader) == 0
    writer.wait(Handed)
    assert num_slots_used(writer) == 0
    writer.node.check_invariants()
    reader.node.check_invariants()


def test_a_bit_that_flips_in_a_slot_before_the_check_never_arrives(
    two: tuple[BouncedEnd, BouncedEnd], protocol: str
) -> None:
    """At the receiver: what a peer wrote and nobody has looked at yet. Over tcp it is hashed as it lands."""
    if protocol == "tcp":
        pytest.skip("tcp: a page is hashed in the thread that has received it, a test cannot get between")
    writer, reader = two
    granted(writer, reader, "w:1", [1])
    (slot,) = reader.bounced._landings.slots_in_use
    release = reader.hold_kv_thread() if protocol == "shm" else None
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
    ends_s = time.monotonic() + 5
    while reader.slots.block(slot) != writer.region.block(0):
        assert time.monotonic() < ends_s, "the push did not land"
        time.sleep(0.01)
    reader.slots.block(slot)[12345] ^= 1
    if release is not None:
        release()
    writer.node.commit("w:1", src_blocks=[0], num_tokens=32, state=b"")
    assert writer.wait(PushFailed).reason == "checksum"
    assert reader.wait(BlocksFree).blocks == (1,)
    assert (num_slots_used(writer), num_slots_used(reader)) == (0, 0)
    assert not any(reader.region.block(1)), "a damaged page got into the engine's KV"


def test_a_bit_that_flips_in_the_writers_slot_after_the_push_never_arrives(
    two: tuple[BouncedEnd, BouncedEnd], protocol: str
) -> None:
    """Over rdma, where the writer hashes at COMMIT what it has pushed."""
    if protocol != "rdma":
        pytest.skip("shm, tcp: hashed while it moves, so a later flip at the writer is of no page that arrives")
    writer, reader = two
    granted(writer, reader, "w:1", [1])
    (there,) = reader.bounced._landings.slots_in_use
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
    ends_s = time.monotonic() + 5
    while reader.slots.block(there) != writer.region.block(0):
        assert time.monotonic() < ends_s, "the push did not land"
        time.sleep(0.01)
    writer.slots.block(writer.bounced._pushes.slots_in_use[0])[12345] ^= 1
    writer.node.commit("w:1", src_blocks=[0], num_tokens=32, state=b"")
    assert writer.wait(PushFailed).reason == "checksum"


def test_what_no_push_has_moved_moves_with_the_commit(two: tuple[BouncedEnd, BouncedEnd]) -> None:
    """A missing layer, a block that was pushed to another place, a page of another block."""
    writer, reader = two
    granted(writer, reader, "w:1", [5, 6, 7])
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS - 1)
    writer.node.push("w:1", [(2, 1), (1, 2)], 0, NUM_LAYERS)
    writer.node.push("w:1", [(9, 0)], 1, 2)
    writer.node.commit("w:1", src_blocks=[0, 1, 2], num_tokens=96, state=b"")
    assert reader.wait(Arrived).blocks == (5, 6, 7)
    for src, dst in ((0, 5), (1, 6), (2, 7)):
        assert reader.region.block(dst) == writer.region.block(src)


def test_a_layer_group_is_copied_as_it_is_when_its_copy_runs_and_pushed_once_it_is_copied(
    two: tuple[BouncedEnd, BouncedEnd],
) -> None:
    writer, reader = two
    granted(writer, reader, "w:1", [1])
    release = writer.hold_copies("out")
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
    time.sleep(0.1)
    assert writer.node.counters().get("sent_bytes", 0) == 0
    release()
    writer.node.commit("w:1", src_blocks=[0], num_tokens=32, state=b"")
    reader.wait(Arrived)
    assert writer.node.counters()["sent_bytes"] == writer.region.block_bytes


def test_the_engine_hears_of_an_arrival_when_it_is_in_its_kv(two: tuple[BouncedEnd, BouncedEnd]) -> None:
    writer, reader = two
    granted(writer, reader, "w:1", [1])
    release = reader.hold_copies("in")
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
    writer.node.commit("w:1", src_blocks=[0], num_tokens=32, state=b"")
    assert not reader.sees(Arrived, within_s=0.3)
    assert reader.node.grants()["COMMITTED"] == 1
    assert not any(reader.region.block(1))
    release()
    reader.wait(Arrived)
    assert reader.region.block(1) == writer.region.block(0)


def test_a_diverted_arrival_is_in_the_kv_and_stays_out_of_the_events(two: tuple[BouncedEnd, BouncedEnd]) -> None:
    writer, reader = two
    taken: list[tuple[tuple[int, ...], bytes]] = []

    def takes(event: Event) -> bool:
        assert isinstance(event, Arrived)
        taken.append((event.blocks, bytes(reader.region.block(event.blocks[0]))))
        return event.xfer == "w:1"

    reader.bounced.divert(takes)
    for name, block in (("w:1", 1), ("w:2", 2)):
        granted(writer, reader, name, [block])
        writer.node.push(name, [(block, 0)], 0, NUM_LAYERS)
        writer.node.commit(name, src_blocks=[block], num_tokens=32, state=b"")
    hears(reader, Arrived, "w:2")
    reader.node.settle("w:1", True)
    reader.node.settle("w:2", False)
    hears(reader, BlocksFree, "w:2")
    assert taken == [((block,), bytes(writer.region.block(block))) for block in (1, 2)]
    assert [event.xfer for event in reader.events if isinstance(event, Arrived)] == ["w:2"]
    assert num_slots_used(reader) == 0


def test_blocks_of_a_cancelled_arrival_come_back_behind_its_copy(two: tuple[BouncedEnd, BouncedEnd]) -> None:
    writer, reader = two
    granted(writer, reader, "w:1", [1])
    release = reader.hold_copies("in")
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
    writer.node.commit("w:1", src_blocks=[0], num_tokens=32, state=b"")
    ends_s = time.monotonic() + 5
    while not reader.node.grants()["COMMITTED"]:
        assert time.monotonic() < ends_s
        time.sleep(0.01)
    reader.node.settle("w:1", False)
    assert not reader.sees(BlocksFree, within_s=0.3)
    assert num_slots_used(reader) == 1
    release()
    hears(reader, BlocksFree, "w:1")
    assert [type(event) for event in reader.events] == [ReserveRequested, Arrived, BlocksFree]
    assert num_slots_used(reader) == 0


def test_source_blocks_are_free_only_when_no_copy_reads_them(two: tuple[BouncedEnd, BouncedEnd]) -> None:
    writer, reader = two
    granted(writer, reader, "w:1", [1])
    release = writer.hold_copies("out")
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
    writer.node.abandon("w:1")
    assert not writer.sees(SourceFree, within_s=0.3)
    assert num_slots_used(writer) == 1
    release()
    writer.wait(SourceFree)
    assert num_slots_used(writer) == 0
    assert reader.wait(BlocksFree).blocks == (1,)
    assert num_slots_used(reader) == 0


def test_pushes_without_slots_wait_and_all_arrive(protocol: str, tmp_path: Path) -> None:
    """Four transfers of four blocks through twelve slots, of which a writer may hold eight."""
    with bounced_pair(tmp_path, protocol, num_slots=12, max_per_transfer=4) as (writer, _):
        reader = End("plain", str(tmp_path), [protocol])
        try:
            names = [f"w:{i}" for i in range(4)]
            for i, name in enumerate(names):
                granted(writer, reader, name, list(range(4 * i, 4 * i + 4)))
                writer.node.push(name, [(4 * i + place, place) for place in range(4)], 0, NUM_LAYERS)
                blocks = list(range(4 * i, 4 * i + 4))
                writer.node.commit(name, src_blocks=blocks, num_tokens=128, state=b"")
            assert num_slots_used(writer) == 8
            for name in names:
                hears(reader, Arrived, name)
                reader.node.settle(name, True)
                hears(writer, Handed, name)
            arrivals = [event.xfer for event in reader.events if isinstance(event, Arrived)]
            assert arrivals == names, "first come, first served"
            for block in range(16):
                assert reader.region.block(block) == writer.region.block(block)
            assert writer.node.counters()["bounce_waits"] == 2
            assert num_slots_used(writer) == 0
        finally:
            reader.close()


def test_a_grant_without_slots_is_refused_before_the_engine_is_asked(protocol: str, tmp_path: Path) -> None:
    with bounced_pair(tmp_path, protocol, num_slots=12, max_per_transfer=4) as (writer, reader):
        granted(writer, reader, "w:1", [0, 1, 2, 3])
        granted(writer, reader, "w:2", [4, 5, 6, 7])
        writer.reserve(reader.address, "w:3", 1)
        assert not reader.sees(ReserveRequested, within_s=0.3)
        assert writer.wait(GrantRefused).reason == "no_slots"
        assert reader.node.counters()["bounce_refusals"] == 1
        writer.node.abandon("w:1")
        reader.wait(BlocksFree)
        granted(writer, reader, "w:4", [0])


@pytest.mark.parametrize("who", ["writer", "reader"])
def test_a_transfer_that_could_never_get_its_slots_is_refused_by_name(protocol: str, tmp_path: Path, who: str) -> None:
    other = End("plain", str(tmp_path), [protocol])
    try:
        with bounced_pair(tmp_path, protocol, num_slots=12, max_per_transfer=4) as (writer, reader):
            source, target = (writer, other) if who == "writer" else (other, reader)
            source.reserve(target.address, "w:1", 5)
            assert not target.sees(ReserveRequested, within_s=0.3)
            assert source.wait(GrantRefused).reason == "too_large"
    finally:
        other.close()


def test_two_nodes_that_fill_each_other_both_get_through(protocol: str, tmp_path: Path) -> None:
    """Each has granted all that it may grant before either pushes."""
    with bounced_pair(tmp_path, protocol, num_slots=8, max_per_transfer=4) as (a, b):
        fill(b.region)
        for source, target, name in ((a, b, "a:1"), (b, a, "b:1")):
            source.reserve(target.address, name, 4)
            target.node.grant(target.wait(ReserveRequested), [20, 21, 22, 23])
            source.wait(GrantReceived)
        for source, name in ((a, "a:1"), (b, "b:1")):
            source.node.push(name, [(place, place) for place in range(4)], 0, NUM_LAYERS)
            source.node.commit(name, src_blocks=[0, 1, 2, 3], num_tokens=128, state=b"")
        for source, target, name in ((a, b, "a:1"), (b, a, "b:1")):
            hears(target, Arrived, name)
            target.node.settle(name, True)
            hears(source, Handed, name)
        for i in range(4):
            assert b.region.block(20 + i) == a.region.block(i)
            assert a.region.block(20 + i) == b.region.block(i)
        assert num_slots_used(a) == num_slots_used(b) == 0


def test_a_copy_that_fails_ends_the_engine(two: tuple[BouncedEnd, BouncedEnd]) -> None:
    writer, reader = two
    granted(writer, reader, "w:1", [1])
    writer.node.push("w:1", [(NUM_BLOCKS + 7, 0)], 0, NUM_LAYERS)  # no such block
    with pytest.raises(Exception, match="copying KV to or from the device failed"):
        writer.wait(PushFailed)
    assert num_slots_used(writer) <= NUM_SLOTS
