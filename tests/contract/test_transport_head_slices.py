"""Ranks that hold different heads: each in a process of its own, every byte of every destination rank checked there."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from kvstore.address import KVAddress
from kvstore.reshard import KVLayout
from kvstore.transport import (
    Arrived,
    BlocksFree,
    GrantReceived,
    GrantRefused,
    PushFailed,
    Refused,
    ReserveRequested,
    Times,
)
from tests.contract.reshard_peer import Spec
from tests.contract.transport_helpers import ROOT, End

HALVES = [
    KVLayout(num_layers=2, num_kv_heads=4, head_lo=lo, head_hi=lo + 2, block_size=8, head_dim=4, dtype="bfloat16")
    for lo in (0, 2)
]
WHOLE = msgspec.structs.replace(HALVES[0], head_hi=4)
MakeEnd = Callable[..., End]


def _spawn(stack: contextlib.ExitStack, role: str, spec: Spec) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.contract.reshard_peer", role, msgspec.json.encode(spec).decode()]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def end() -> None:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            pipe.close()

    stack.callback(end)
    return child


def _shared_heads(writer: int, num_writers: int, reader: int, num_readers: int) -> bool:
    return writer * num_readers < (reader + 1) * num_writers and reader * num_writers < (writer + 1) * num_readers


@pytest.mark.parametrize("protocol", ["shm", "tcp"])
@pytest.mark.parametrize(
    ("num_writers", "num_readers", "sizes"),
    [(8, 4, (16, 16)), (4, 2, (16, 32)), (2, 1, (32, 16)), (1, 2, (16, 16)), (2, 8, (8, 16))],
)
def test_each_rank_gets_its_heads_from_those_that_hold_them(
    tmp_path: Path, protocol: str, num_writers: int, num_readers: int, sizes: tuple[int, int]
) -> None:
    num_tokens = 75
    with contextlib.ExitStack() as stack:
        readers = [
            _spawn(stack, "reader", Spec(protocol, str(tmp_path), rank, num_readers, sizes[1], num_tokens))
            for rank in range(num_readers)
        ]
        writers = [
            _spawn(stack, "writer", Spec(protocol, str(tmp_path), rank, num_writers, sizes[0], num_tokens))
            for rank in range(num_writers)
        ]
        addresses = []
        for reader in readers:
            assert reader.stdout is not None
            addresses.append(msgspec.json.decode(reader.stdout.readline(), type=KVAddress))
        for rank, writer in enumerate(writers):
            targets = [a for k, a in enumerate(addresses) if _shared_heads(rank, num_writers, k, num_readers)]
            assert writer.stdin is not None
            writer.stdin.write(msgspec.json.encode(targets).decode() + "\n")
            writer.stdin.flush()
        answers = [child.stdout.readline().strip() for child in (*readers, *writers) if child.stdout is not None]
    assert answers == ["OK"] * (num_readers + num_writers)


@pytest.fixture(params=["shm", "tcp"])
def make_end(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeEnd]:
    with contextlib.ExitStack() as stack:

        def make(name: str, layout: KVLayout, **options: object) -> End:
            end = End(name, str(tmp_path), [request.param], layout=layout, **options)  # type: ignore[arg-type]
            stack.callback(end.close)
            return end

        yield make


def _reserve(writer: End, reader: End, xfer: str, *, group: str = "g", rid: str = "r") -> None:
    writer.node.reserve(
        reader.address, xfer, rid=rid, epoch=1, token="t", num_blocks=2, deadline_s=30, num_tokens=16, group=group
    )


def _granted(writers: list[End], reader: End) -> None:
    for k, writer in enumerate(writers):
        _reserve(writer, reader, f"w{k}")
    reader.node.grant(reader.wait(ReserveRequested), [3, 5])
    for writer in writers:
        writer.wait(GrantReceived)


def _push(writer: End, xfer: str, *, state: bytes = b"s") -> None:
    writer.node.push(xfer, [(0, 0), (1, 1)], 0, 2)
    writer.node.commit(xfer, src_blocks=[0, 1], num_tokens=16, state=state)


def test_the_loss_of_one_writer_gives_the_blocks_back_when_the_other_has_stopped(make_end: MakeEnd) -> None:
    writers, reader = [make_end(f"p{k}", HALVES[k]) for k in (0, 1)], make_end("reader", WHOLE)
    _granted(writers, reader)
    _push(writers[0], "w0")
    writers[1].close()
    assert writers[0].sees(PushFailed, within_s=5) or any(isinstance(e, Refused) for e in writers[0].events)
    assert reader.wait(BlocksFree).blocks == (3, 5)
    assert sum(reader.node.grants().values()) == 0
    reader.node.check_invariants()
    assert not any(isinstance(event, Arrived) for event in reader.events)


def test_a_group_that_stays_incomplete_is_cancelled(make_end: MakeEnd) -> None:
    times = Times(commit_s=0.4, commit_every_s=0.1)
    writer, reader = make_end("p0", HALVES[0], times=times), make_end("reader", WHOLE, times=times)
    _reserve(writer, reader, "w0")
    reader.node.grant(reader.wait(ReserveRequested), [3, 5])
    writer.wait(GrantReceived)
    _push(writer, "w0")
    assert reader.wait(BlocksFree, timeout_s=5).blocks == (3, 5)
    _reserve(writer, reader, "w1")
    assert writer.wait(GrantRefused).reason == "ended"


def test_a_part_of_the_heads_needs_a_group_and_members_that_agree(make_end: MakeEnd) -> None:
    writers, reader = [make_end(f"p{k}", HALVES[k]) for k in (0, 1)], make_end("reader", WHOLE)
    _reserve(writers[0], reader, "w0", group="")
    assert writers[0].wait(GrantRefused).reason == "needs_group"
    _reserve(writers[0], reader, "w1")
    reader.wait(ReserveRequested)
    _reserve(writers[1], reader, "w2", rid="another")
    assert writers[1].wait(GrantRefused).reason == "group"
    _reserve(writers[0], reader, "w3")
    assert writers[0].wait(GrantRefused).reason == "group", "the same heads twice"


def test_a_refused_group_refuses_every_member(make_end: MakeEnd) -> None:
    writers, reader = [make_end(f"p{k}", HALVES[k]) for k in (0, 1)], make_end("reader", WHOLE)
    _reserve(writers[0], reader, "w0")
    request = reader.wait(ReserveRequested)
    _reserve(writers[1], reader, "w1")
    assert not reader.sees(ReserveRequested, within_s=0.2)
    reader.node.grant(request, None, reason="no_space")
    assert [writer.wait(GrantRefused).reason for writer in writers] == ["no_space", "no_space"]


def test_writers_that_commit_different_states_hand_nothing_over(make_end: MakeEnd) -> None:
    writers, reader = [make_end(f"p{k}", HALVES[k]) for k in (0, 1)], make_end("reader", WHOLE)
    _granted(writers, reader)
    _push(writers[0], "w0", state=b"one")
    _push(writers[1], "w1", state=b"another")
    assert reader.wait(BlocksFree).blocks == (3, 5)
    assert not any(isinstance(event, Arrived) for event in reader.events)
