"""What every transport does: KV arrives whole, or the writer learns why not; and every block comes back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from kvstore.transport import (
    Arrived,
    BlocksFree,
    GrantReceived,
    GrantRefused,
    Handed,
    PushFailed,
    Refused,
    ReserveRequested,
    SourceFree,
    Times,
)
from tests.contract.transport_helpers import PROTOCOLS, End, FlippingRelay, fill, granted
from tests.contract.transport_peer import NUM_BLOCKS, NUM_LAYERS
from tests.stopwatch import Stopwatch

MakeEnd = Callable[..., End]


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_end(protocol: str, tmp_path: Path) -> Iterator[MakeEnd]:
    with contextlib.ExitStack() as stack:

        def make(name: str, **options: object) -> End:
            end = End(name, str(tmp_path), [protocol], **options)  # type: ignore[arg-type]
            stack.callback(end.close)
            return end

        yield make


@pytest.fixture
def pair(make_end: MakeEnd) -> tuple[End, End]:
    writer, reader = make_end("writer"), make_end("reader")
    fill(writer.region)
    return writer, reader


def test_pushed_blocks_arrive_byte_for_byte(pair: tuple[End, End]) -> None:
    writer, reader = pair
    granted(writer, reader, "w:1", [9, 4, 30, 5])
    for layer in range(NUM_LAYERS):
        writer.node.push("w:1", [(2, 0), (3, 1), (17, 2)], layer, layer + 1)
    writer.node.commit("w:1", src_blocks=[2, 3, 17], num_tokens=90, state=b"sampling")

    arrived = reader.wait(Arrived)
    assert (arrived.rid, arrived.epoch, arrived.token, arrived.num_tokens) == ("rid-w:1", 3, "tok", 90)
    assert (arrived.blocks, arrived.state) == ((9, 4, 30, 5), b"sampling")
    assert arrived.num_bytes == 3 * writer.region.block_bytes
    for src, dst in ((2, 9), (3, 4), (17, 30)):
        assert reader.region.block(dst) == writer.region.block(src)
    assert not any(reader.region.block(5)), "the growth block was written"
    assert reader.node.grants() == {"LEASED": 0, "COMMITTED": 4, "QUARANTINED": 0}

    reader.node.settle("w:1", True)
    writer.wait(Handed)
    (link,) = [link for link in writer.node.links() if link.host_id == reader.address.host_id]
    assert link.num_transfers == 1
    totals = writer.node.counters()
    assert totals["link_measured_s"] == arrived.transfer_s > 0
    assert totals["link_predicted_s"] > 0
    assert not reader.sees(BlocksFree, within_s=0.2)
    assert sum(reader.node.grants().values()) == 0
    reader.node.check_invariants()


def test_a_refused_handoff_gives_the_blocks_back(pair: tuple[End, End]) -> None:
    writer, reader = pair
    granted(writer, reader, "w:1", [1])
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
    writer.node.commit("w:1", src_blocks=[0], num_tokens=5, state=b"")
    reader.wait(Arrived)
    reader.node.settle("w:1", False)
    assert writer.wait(Refused).reason == "handoff"
    assert reader.wait(BlocksFree).blocks == (1,)


def test_a_refused_reservation_says_why(pair: tuple[End, End]) -> None:
    writer, reader = pair
    writer.reserve(reader.address, "w:1", 4)
    reader.node.grant(reader.wait(ReserveRequested), None, reason="no_space")
    assert writer.wait(GrantRefused).reason == "no_space"
    writer.reserve(reader.address, "w:2", NUM_BLOCKS + 1)
    assert writer.wait(GrantRefused).reason == "too_large"


def test_many_transfers_share_a_link(pair: tuple[End, End]) -> None:
    writer, reader = pair
    for i in range(NUM_BLOCKS):
        granted(writer, reader, f"w:{i}", [NUM_BLOCKS - 1 - i])
    for i in range(NUM_BLOCKS):
        writer.node.push(f"w:{i}", [(i, 0)], 0, NUM_LAYERS)
        writer.node.commit(f"w:{i}", src_blocks=[i], num_tokens=32, state=b"")
    for _ in range(NUM_BLOCKS):
        reader.node.settle(reader.wait(Arrived).xfer, True)
    for _ in range(NUM_BLOCKS):
        writer.wait(Handed)
    for i in range(NUM_BLOCKS):
        assert reader.region.block(NUM_BLOCKS - 1 - i) == writer.region.block(i)


def test_a_missing_layer_never_arrives(pair: tuple[End, End]) -> None:
    """COMMIT before all data."""
    writer, reader = pair
    granted(writer, reader, "w:1", [1, 2])
    writer.node.push("w:1", [(0, 0), (1, 1)], 0, NUM_LAYERS - 1)
    writer.node.commit("w:1", src_blocks=[0, 1], num_tokens=50, state=b"")
    assert writer.wait(PushFailed).reason in ("checksum", "incomplete")
    assert reader.wait(BlocksFree).blocks == (1, 2)
    assert not any(isinstance(event, Arrived) for event in reader.events)


def test_a_bit_that_flips_between_copy_and_check_never_arrives(pair: tuple[End, End], protocol: str) -> None:
    """shm, rdma: in the page itself, before the receiver has looked at it. tcp: on the wire."""
    writer, reader = pair
    with contextlib.ExitStack() as stack:
        if protocol == "tcp":
            relay = stack.enter_context(FlippingRelay(reader.address.tcp_port, at_byte=100_000))
            reader.address = msgspec.structs.replace(reader.address, tcp_port=relay.port)
        granted(writer, reader, "w:1", [1])
        release = reader.hold_kv_thread() if protocol == "shm" else None
        writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
        if protocol != "tcp":
            ends_s = time.monotonic() + 5
            while reader.region.block(1) != writer.region.block(0):
                assert time.monotonic() < ends_s, "the push did not land"
                time.sleep(0.01)
            reader.region.block(1)[12345] ^= 1
        if release is not None:
            release()
        writer.node.commit("w:1", src_blocks=[0], num_tokens=32, state=b"")
        assert writer.wait(PushFailed).reason == "checksum"
        assert reader.wait(BlocksFree).blocks == (1,)
        assert reader.node.rejects() == {"checksum": 1}


def test_blocks_pushed_twice_and_out_of_order_arrive_as_they_were_last(pair: tuple[End, End]) -> None:
    writer, reader = pair
    granted(writer, reader, "w:1", [5, 6, 7])
    writer.node.push("w:1", [(2, 2), (0, 0)], 1, NUM_LAYERS)
    writer.node.push("w:1", [(9, 1)], 0, NUM_LAYERS)  # not what is committed: replaced below
    writer.node.push("w:1", [(2, 2), (0, 0)], 0, 1)
    writer.node.push("w:1", [(1, 1)], 0, NUM_LAYERS)
    writer.node.commit("w:1", src_blocks=[0, 1, 2], num_tokens=96, state=b"")
    assert reader.wait(Arrived).num_tokens == 96
    for src, dst in ((0, 5), (1, 6), (2, 7)):
        assert reader.region.block(dst) == writer.region.block(src)


def test_bytes_moved_before_the_commit_count_as_hidden_behind_the_compute(pair: tuple[End, End], protocol: str) -> None:
    writer, reader = pair
    granted(writer, reader, "w:1", [1, 2])
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)  # while the engine computes
    ends_s = time.monotonic() + 10
    while reader.region.block(1) != writer.region.block(0):
        assert time.monotonic() < ends_s, "the push did not land"
        time.sleep(0.01)
    release = writer.hold_kv_thread()
    writer.node.push("w:1", [(1, 1)], 0, NUM_LAYERS)
    writer.node.commit("w:1", src_blocks=[0, 1], num_tokens=64, state=b"")
    release()
    reader.wait(Arrived)
    totals = writer.node.counters()
    assert totals["committed_bytes"] == totals["sent_bytes"] == 2 * writer.region.block_bytes
    assert totals["hidden_bytes"] == writer.region.block_bytes, protocol


def test_a_page_of_another_block_than_the_committed_one_never_arrives(pair: tuple[End, End]) -> None:
    writer, reader = pair
    granted(writer, reader, "w:1", [5, 6])
    writer.node.push("w:1", [(0, 0), (1, 1)], 0, NUM_LAYERS)
    writer.node.push("w:1", [(9, 1)], 2, 3)
    writer.node.commit("w:1", src_blocks=[0, 1], num_tokens=64, state=b"")
    assert writer.wait(PushFailed).reason == "checksum"


def test_swapped_pages_are_noticed_and_a_second_push_goes_through(pair: tuple[End, End]) -> None:
    writer, reader = pair
    granted(writer, reader, "w:1", [1, 2])
    writer.node.push("w:1", [(1, 0), (0, 1)], 0, NUM_LAYERS)
    writer.node.commit("w:1", src_blocks=[0, 1], num_tokens=64, state=b"")
    assert writer.wait(PushFailed).reason == "checksum"
    granted(writer, reader, "w:2", [3, 4])
    writer.node.push("w:2", [(0, 0), (1, 1)], 0, NUM_LAYERS)
    writer.node.commit("w:2", src_blocks=[0, 1], num_tokens=64, state=b"")
    assert reader.wait(Arrived).blocks == (3, 4)


def test_an_abandoned_transfer_frees_both_ends(pair: tuple[End, End]) -> None:
    writer, reader = pair
    granted(writer, reader, "w:1", [1, 2])
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
    writer.node.abandon("w:1")
    writer.wait(SourceFree)
    assert reader.wait(BlocksFree).blocks == (1, 2)


def test_abandon_of_a_transfer_that_is_over_still_says_source_free(pair: tuple[End, End]) -> None:
    writer, _ = pair
    writer.node.abandon("w:404")
    assert writer.wait(SourceFree).xfer == "w:404"


def test_abandon_before_the_grant_leaves_nothing(pair: tuple[End, End]) -> None:
    """The engine grants what nobody wants any more: the blocks come back, and the late GRANT is never used."""
    writer, reader = pair
    writer.reserve(reader.address, "w:1", 2)
    request = reader.wait(ReserveRequested)
    writer.node.abandon("w:1")
    writer.wait(SourceFree)
    reader.node.grant(request, [1, 2])
    assert reader.wait(BlocksFree).blocks == (1, 2)
    assert not writer.sees(GrantReceived, within_s=0.2)


def test_a_cancel_by_the_receiver_fences_the_writer_first(pair: tuple[End, End]) -> None:
    writer, reader = pair
    granted(writer, reader, "w:1", [1, 2])
    reader.node.settle("w:1", False)
    assert writer.wait(PushFailed).reason == "fenced"
    assert reader.wait(BlocksFree).blocks == (1, 2)


def test_a_receiver_that_never_answers_a_reservation_is_given_up(make_end: MakeEnd) -> None:
    writer = make_end("writer", times=Times(reserve_s=0.3))
    reader = make_end("reader")
    writer.reserve(reader.address, "w:1", 2)
    request = reader.wait(ReserveRequested)
    assert writer.wait(GrantRefused).reason == "timeout"
    reader.node.grant(request, [1, 2])  # timeline b: the late GRANT
    assert reader.wait(BlocksFree).blocks == (1, 2)
    assert not writer.sees(GrantReceived, within_s=0.2)


def test_a_commit_without_answer_is_given_up_and_its_blocks_stay_with_the_receiver(make_end: MakeEnd) -> None:
    """Timeline c: the first receiver is slow; it may still hand off, and is told to free by its own engine only."""
    writer = make_end("writer", times=Times(commit_s=0.5, commit_every_s=0.1))
    reader = make_end("reader")
    fill(writer.region)
    granted(writer, reader, "w:1", [1])
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
    writer.node.commit("w:1", src_blocks=[0], num_tokens=32, state=b"")
    reader.wait(Arrived)
    assert writer.wait(PushFailed).reason == "unanswered"
    assert not reader.sees(BlocksFree, within_s=0.3), "COMMITTED: ABORT changes nothing"
    reader.node.settle("w:1", False)
    assert reader.wait(BlocksFree).blocks == (1,)
    assert sum(isinstance(event, Arrived) for event in reader.events) == 1, "a repeated COMMIT arrived twice"


def test_a_repeated_commit_is_answered_again(make_end: MakeEnd) -> None:
    writer = make_end("writer", times=Times(commit_every_s=0.05))
    reader = make_end("reader")
    granted(writer, reader, "w:1", [1])
    writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
    writer.node.commit("w:1", src_blocks=[0], num_tokens=32, state=b"")
    reader.wait(Arrived)
    assert not writer.sees(Handed, within_s=0.4)
    reader.node.settle("w:1", True)
    writer.wait(Handed)
    assert sum(isinstance(event, Arrived) for event in reader.events) == 1


def test_the_deadline_ends_a_transfer_at_both_ends(pair: tuple[End, End]) -> None:
    writer, reader = pair
    writer.reserve(reader.address, "w:1", 2, deadline_s=0.6)
    reader.node.grant(reader.wait(ReserveRequested), [1, 2])
    assert writer.wait(PushFailed).reason == "deadline"
    assert reader.wait(BlocksFree).blocks == (1, 2)


def test_an_address_nobody_listens_on_is_refused_and_then_backed_off(pair: tuple[End, End]) -> None:
    writer, reader = pair
    reader.close()
    writer.reserve(reader.address, "w:1", 2)
    assert writer.wait(GrantRefused).reason.startswith(("unreachable", "channel_lost"))
    writer.reserve(reader.address, "w:2", 2)
    assert writer.wait(GrantRefused).reason == "backoff"


@pytest.mark.parametrize(
    ("options", "reason"), [({"secret": b"another"}, "auth"), ({"compat": "compat-2"}, "incompatible")]
)
def test_a_pair_that_does_not_fit_is_refused_by_name(
    make_end: MakeEnd, options: dict[str, object], reason: str
) -> None:
    writer, reader = make_end("writer", **options), make_end("reader")
    writer.reserve(reader.address, "w:1", 2)
    assert writer.wait(GrantRefused).reason == reason
    assert not reader.sees(ReserveRequested, within_s=0.1)


def test_a_new_owner_of_the_address_is_not_written_to(make_end: MakeEnd) -> None:
    writer, reader = make_end("writer"), make_end("reader")
    stale = msgspec.structs.replace(reader.address, incarnation="reader-before-its-restart")
    writer.reserve(stale, "w:1", 2)
    assert writer.wait(GrantRefused).reason == "incarnation"


def test_a_stopped_writer_node_is_proven_dead(pair: tuple[End, End]) -> None:
    writer, reader = pair
    granted(writer, reader, "w:1", [1, 2])
    writer.close()
    assert reader.wait(BlocksFree).blocks == (1, 2)


def test_a_stopped_receiver_node_fails_the_push_at_once(pair: tuple[End, End]) -> None:
    writer, reader = pair
    granted(writer, reader, "w:1", [1, 2])
    with Stopwatch() as watch:
        reader.close()
        assert writer.wait(PushFailed).reason.startswith("channel_lost")
    watch.assert_within(1.0)
