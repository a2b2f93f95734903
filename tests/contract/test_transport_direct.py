"""Nodes over KV that rdma writes where it lies keep the contract of transports, with each other and with host regions.

A CPU has no memory of a device: private memory stands in for it, registered as what it is, and its digests are computed
by the same torch code as on a GPU.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.transport import (
    Arrived,
    BlocksFree,
    GrantReceived,
    GrantRefused,
    Handed,
    KVNode,
    MemoryKind,
    PushFailed,
    ReserveRequested,
    SourceFree,
    TransportError,
)
from tests.contract.bounced_end import BouncedEnd, DeviceBytes
from tests.contract.direct_end import DirectEnd
from tests.contract.test_transport import (
    MakeEnd,
    pair,
    test_a_bit_that_flips_between_copy_and_check_never_arrives,
    test_a_cancel_by_the_receiver_fences_the_writer_first,
    test_a_commit_without_answer_is_given_up_and_its_blocks_stay_with_the_receiver,
    test_a_missing_layer_never_arrives,
    test_a_new_owner_of_the_address_is_not_written_to,
    test_a_page_of_another_block_than_the_committed_one_never_arrives,
    test_a_pair_that_does_not_fit_is_refused_by_name,
    test_a_receiver_that_never_answers_a_reservation_is_given_up,
    test_a_refused_handoff_gives_the_blocks_back,
    test_a_refused_reservation_says_why,
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
    test_swapped_pages_are_noticed_and_a_second_push_goes_through,
    test_the_deadline_ends_a_transfer_at_both_ends,
)
from tests.contract.transport_helpers import Child, End, fill, granted, needs_nixl
from tests.contract.transport_peer import COMPAT, NUM_LAYERS, SECRET

__all__ = [
    "pair",
    "test_a_bit_that_flips_between_copy_and_check_never_arrives",
    "test_a_cancel_by_the_receiver_fences_the_writer_first",
    "test_a_commit_without_answer_is_given_up_and_its_blocks_stay_with_the_receiver",
    "test_a_missing_layer_never_arrives",
    "test_a_new_owner_of_the_address_is_not_written_to",
    "test_a_page_of_another_block_than_the_committed_one_never_arrives",
    "test_a_pair_that_does_not_fit_is_refused_by_name",
    "test_a_receiver_that_never_answers_a_reservation_is_given_up",
    "test_a_refused_handoff_gives_the_blocks_back",
    "test_a_refused_reservation_says_why",
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
    "test_swapped_pages_are_noticed_and_a_second_push_goes_through",
    "test_the_deadline_ends_a_transfer_at_both_ends",
]

pytestmark = needs_nixl
KINDS = {"direct": DirectEnd, "plain": End, "bounced": BouncedEnd}
PAIRS = [("direct", "direct"), ("direct", "plain"), ("plain", "direct"), ("direct", "bounced"), ("bounced", "direct")]


@pytest.fixture
def protocol() -> str:
    return "rdma"


@pytest.fixture(params=PAIRS[:3], ids=" to ".join)
def make_end(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeEnd]:
    """The writer is of the first kind, and so is whoever has another name than the reader."""
    kinds = dict(zip(("writer", "reader"), request.param, strict=True))
    with contextlib.ExitStack() as stack:

        def make(name: str, **options: object) -> End:
            kind = KINDS[kinds.get(name, "direct")]
            end = kind(name, str(tmp_path), ["rdma"], **options)  # type: ignore[arg-type]
            stack.callback(end.close)
            return end

        yield make


@contextlib.contextmanager
def ends(folder: Path, writer_kind: str = "direct", reader_kind: str = "direct") -> Iterator[tuple[End, End]]:
    writer, reader = (
        KINDS[writer_kind]("writer", str(folder), ["rdma"]),
        KINDS[reader_kind]("reader", str(folder), ["rdma"]),
    )
    try:
        fill(writer.region)
        yield writer, reader
    finally:
        writer.close()
        reader.close()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[DirectEnd, DirectEnd]]:
    with ends(tmp_path) as (writer, reader):
        assert isinstance(writer, DirectEnd) and isinstance(reader, DirectEnd)
        yield writer, reader


@pytest.mark.parametrize(("writer_kind", "reader_kind"), PAIRS)
def test_layer_groups_arrive_whatever_memory_each_end_has(tmp_path: Path, writer_kind: str, reader_kind: str) -> None:
    with ends(tmp_path, writer_kind, reader_kind) as (writer, reader):
        granted(writer, reader, "w:1", [9, 4, 30])
        for lo, hi in ((2, 4), (0, 1), (1, 2)):
            writer.node.push("w:1", [(2, 0), (17, 2), (3, 1)], lo, hi)
        writer.node.commit("w:1", src_blocks=[2, 3, 17], num_tokens=90, state=b"s")
        assert reader.wait(Arrived).blocks == (9, 4, 30)
        for src, dst in ((2, 9), (3, 4), (17, 30)):
            assert reader.region.block(dst) == writer.region.block(src)
        reader.node.settle("w:1", True)
        writer.wait(Handed)
        assert writer.node.counters()["links_rdma"] == 1
        writer.node.check_invariants()
        reader.node.check_invariants()


def test_a_push_is_not_posted_before_its_gate_opens(two: tuple[DirectEnd, DirectEnd]) -> None:
    writer, reader = two
    granted(writer, reader, "w:1", [1])
    release = writer.hold_gates()
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
    writer.node.commit("w:1", src_blocks=[0], num_tokens=32, state=b"")
    assert not reader.sees(Arrived, within_s=0.2)
    assert writer.node.counters().get("sent_bytes", 0) == 0
    release()
    reader.wait(Arrived)
    assert reader.region.block(1) == writer.region.block(0)


def test_a_peer_is_told_of_blocks_only_when_the_device_is_done_with_them(two: tuple[DirectEnd, DirectEnd]) -> None:
    writer, reader = two
    writer.reserve(reader.address, "w:1", 1)
    request = reader.wait(ReserveRequested)
    release = reader.hold_gates()
    reader.node.grant(request, [1])
    assert not writer.sees(GrantReceived, within_s=0.2)
    release()
    writer.wait(GrantReceived)


def test_an_abandon_comes_behind_the_pushes_it_ends(two: tuple[DirectEnd, DirectEnd]) -> None:
    writer, reader = two
    granted(writer, reader, "w:1", [1])
    release = writer.hold_gates()
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
    writer.node.abandon("w:1")
    assert not writer.sees(SourceFree, within_s=0.2), "a push that waits may still be posted"
    release()
    writer.wait(SourceFree)
    assert reader.wait(BlocksFree).blocks == (1,)


def test_a_cancelled_grant_that_waits_for_its_gate_gives_the_blocks_back(two: tuple[DirectEnd, DirectEnd]) -> None:
    writer, reader = two
    writer.reserve(reader.address, "w:1", 2)
    request = reader.wait(ReserveRequested)
    release = reader.hold_gates()
    reader.node.grant(request, [4, 5])
    reader.node.settle("w:1", False)
    assert not reader.sees(BlocksFree, within_s=0.1)
    release()
    assert reader.wait(BlocksFree).blocks == (4, 5)


def test_a_device_that_fails_while_a_gate_is_waited_for_ends_the_engine(two: tuple[DirectEnd, DirectEnd]) -> None:
    writer, reader = two

    class Broken:
        def synchronize(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    granted(writer, reader, "w:1", [1])
    writer.direct._gate = Broken  # type: ignore[assignment]
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
    with pytest.raises(TransportError, match="waiting for the device of the KV failed"):
        writer.wait(PushFailed)


def test_a_commit_of_another_epoch_never_arrives(two: tuple[DirectEnd, DirectEnd]) -> None:
    writer, reader = two
    granted(writer, reader, "w:1", [1])
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
    writer.inner._writer._link_of["w:1"].transfers["w:1"].epoch = 2
    writer.node.commit("w:1", src_blocks=[0], num_tokens=32, state=b"")
    assert writer.wait(PushFailed).reason == "stale_epoch"
    assert reader.wait(BlocksFree).blocks == (1,)


def test_metadata_of_another_kind_of_memory_is_refused_by_nixl_and_nothing_is_written(
    two: tuple[DirectEnd, DirectEnd],
) -> None:
    """A receiver that says its memory is a GPU's, which its metadata does not bear out."""
    writer, reader = two
    region = reader.inner._context.region
    region.kind = MemoryKind("vram", 3)  # type: ignore[misc]
    granted(writer, reader, "w:1", [1])
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
    assert writer.wait(PushFailed).reason == "channel_lost: rdma"
    assert reader.wait(BlocksFree).blocks == (1,)
    assert not any(reader.region.block(1))


@pytest.mark.parametrize("role", ["direct-writer", "writer"])
def test_nothing_of_a_killed_writer_lands_after_its_pages_came_back(tmp_path: Path, role: str) -> None:
    end = DirectEnd("here", str(tmp_path))
    try:
        with Child(role, "rdma", str(tmp_path), end.address) as child:
            end.node.grant(end.wait(ReserveRequested, timeout_s=120), list(range(10, 18)))
            assert child.read_event() == "GrantReceived"
            child.tell("push")
            time.sleep(0.1)
            child.signal(signal.SIGKILL)
            assert end.wait(BlocksFree).blocks == tuple(range(10, 18))
            end.region.kv[10:18] = 0  # type: ignore[attr-defined]
            time.sleep(0.3)
            assert not end.region.kv[10:18].any()  # type: ignore[attr-defined]
            end.node.check_invariants()
    finally:
        end.close()


@pytest.mark.parametrize("way", ["killed", "closed"])
def test_a_receiver_that_is_gone_fails_the_push(tmp_path: Path, way: str) -> None:
    end = DirectEnd("here", str(tmp_path))
    try:
        with Child("direct-receiver", "rdma", str(tmp_path)) as child:
            end.reserve(child.address, "w:1", 4)
            end.wait(GrantReceived, timeout_s=120)
            for _ in range(50):
                end.node.push("w:1", [(place, place) for place in range(4)], 0, NUM_LAYERS)
            if way == "killed":
                child.signal(signal.SIGKILL)
            else:
                child.tell("")
            assert end.wait(PushFailed).reason.startswith("channel_lost")
    finally:
        end.close()


@pytest.mark.parametrize("protocols", [("shm",), ("rdma", "tcp"), ("tcp",)])
def test_a_node_over_device_memory_refuses_every_other_protocol(protocols: tuple[str, ...]) -> None:
    from engines.device_kv.device_region import DeviceRegion

    region = DeviceRegion(DeviceBytes(2, 1, 4096).kv)
    with pytest.raises(ValueError, match=r"over memory of a device: expected rdma alone"):
        KVNode(incarnation="a", region=region, secret=SECRET, compat=COMPAT, protocols=protocols)


def test_a_peer_without_rdma_is_refused_by_name(tmp_path: Path) -> None:
    writer = DirectEnd("writer", str(tmp_path))
    reader = End("reader", str(tmp_path), ["tcp"])
    try:
        writer.reserve(reader.address, "w:1", 1)
        assert writer.wait(GrantRefused).reason.startswith("no_rdma: this worker has nixl-cu12 ")
    finally:
        writer.close()
        reader.close()
