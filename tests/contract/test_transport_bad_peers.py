"""Peers that do not keep to the protocol: their connection ends, counted by reason; the others notice nothing."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.transport import Arrived, BlocksFree, GrantReceived, HandshakeRefused, ReserveRequested, receiver
from kvstore.transport.checksum import TransferChecksum
from kvstore.transport.frames import (
    HEADER,
    MAGIC,
    VERSION,
    Body,
    Challenge,
    Commit,
    DataHeader,
    FenceBody,
    FrameType,
    GrantBody,
    Proof,
    RefusedBody,
    Reject,
    Reserve,
    data_frame,
    frame,
    parse_body,
    parse_header,
    pushed_frame,
)
from kvstore.transport.handshake import WriterHandshake
from tests.contract.transport_helpers import End
from tests.contract.transport_peer import COMPAT, LAYER_BYTES, NUM_LAYERS, SECRET


@pytest.fixture
def end(tmp_path: Path) -> Iterator[End]:
    node = End("reader", str(tmp_path), ["tcp"])
    yield node
    node.close()


class RawWriter:
    """A writer by hand, on a blocking socket."""

    def __init__(self, end: End) -> None:
        self.sock = socket.create_connection((end.address.tcp_host, end.address.tcp_port), timeout=5)
        self._end = end

    def greet(self) -> RawWriter:
        self.hello = WriterHandshake(
            secrets=[SECRET], incarnation="raw", target="reader", compat=COMPAT, protocol="tcp"
        )  # fmt: skip
        self.send(FrameType.HELLO, self.hello.hello)
        _, body = self.read(FrameType.CHALLENGE)
        self.send(FrameType.PROOF, self.hello.prove(parse_body(FrameType.CHALLENGE, body, Challenge)))
        self.read(FrameType.WELCOME)
        return self

    def reserve(self, blocks: list[int], *, xfer: str = "raw:1") -> GrantBody:
        self.send(FrameType.RESERVE, Reserve(xfer, "rid", 5, "tok", len(blocks)))
        self._end.node.grant(self._end.wait(ReserveRequested), blocks)
        return parse_body(FrameType.GRANT, self.read(FrameType.GRANT)[1], GrantBody)

    def send(self, kind: FrameType, body: Body) -> None:
        self.sock.sendall(frame(kind, body))

    def read(self, kind: FrameType) -> tuple[FrameType, bytes]:
        """The next frame of this type; others are skipped."""
        while True:
            got, length = parse_header(self._exactly(HEADER.size))
            body = self._exactly(length)
            if got is kind:
                return got, body
            if got is FrameType.REJECT:
                reject = parse_body(got, body, Reject)
                raise HandshakeRefused(reason=reject.reason, detail=reject.detail)

    def is_closed(self) -> bool:
        """Within the timeout, whatever still comes before it."""
        try:
            while self.sock.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True

    def _exactly(self, num_bytes: int) -> bytes:
        got = b""
        while len(got) < num_bytes:
            piece = self.sock.recv(num_bytes - len(got))
            if not piece:
                raise EOFError
            got += piece
        return got


def good_data(grant: GrantBody, **changes: int) -> DataHeader:
    fields = {"serial": grant.serial, "epoch": 5, "first": 0, "num_places": 1, "layer_lo": 0, "layer_hi": 1} | changes
    return DataHeader(**fields)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "bad_magic"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00", "bad_magic"),
        (HEADER.pack(MAGIC, VERSION, 99, 0, 0), "bad_type"),
        (HEADER.pack(MAGIC, VERSION, FrameType.HELLO, 1, 10), "bad_type"),
        (HEADER.pack(MAGIC, VERSION, FrameType.HELLO, 0, 2**31), "length"),
        (HEADER.pack(MAGIC, VERSION, FrameType.COMMIT, 0, 2**32 - 1), "length"),
        (HEADER.pack(MAGIC, VERSION, FrameType.COMMIT, 0, 1 << 20), "state"),
        (HEADER.pack(MAGIC, VERSION, FrameType.WELCOME, 0, 60 << 10), "state"),
        (HEADER.pack(MAGIC, VERSION, FrameType.DATA, 0, 0), "length"),
        (HEADER.pack(MAGIC, VERSION, FrameType.HELLO, 0, 0), "body"),
        (HEADER.pack(MAGIC, VERSION, FrameType.HEARTBEAT, 0, 1), "length"),
        (HEADER.pack(MAGIC, VERSION, FrameType.HELLO, 0, 5) + b"\xc1" * 5, "body"),
        (HEADER.pack(MAGIC, VERSION, FrameType.RESERVE, 0, 1) + b"\x90", "state"),
        (data_frame(DataHeader(1, 1, 0, 1, 0, 1), LAYER_BYTES), "state"),
    ],
)
def test_garbage_before_the_handshake_is_counted_and_cut(end: End, raw: bytes, reason: str) -> None:
    writer = RawWriter(end)
    writer.sock.sendall(raw)
    assert writer.is_closed()
    assert end.node.rejects() == {reason: 1}


def test_another_protocol_version_is_told_the_supported_one(end: End) -> None:
    writer = RawWriter(end)
    writer.sock.sendall(HEADER.pack(MAGIC, VERSION + 1, FrameType.HELLO, 0, 0))
    reject = parse_body(FrameType.REJECT, writer.read(FrameType.REJECT)[1], Reject)
    assert reject.reason == "version"
    assert f"supported is {VERSION}" in reject.detail


@pytest.mark.parametrize("secret", [b"a guess", SECRET])
def test_a_wrong_secret_or_proof_is_refused_without_detail_after_a_delay(end: End, secret: bytes) -> None:
    writer = RawWriter(end)
    hello = WriterHandshake(secrets=[secret], incarnation="raw", target="reader", compat=COMPAT, protocol="tcp")
    start_s = time.monotonic()
    writer.send(FrameType.HELLO, hello.hello)
    if secret == SECRET:
        writer.read(FrameType.CHALLENGE)
        writer.send(FrameType.PROOF, Proof(bytes(32)))
    reject = parse_body(FrameType.REJECT, writer.read(FrameType.REJECT)[1], Reject)
    assert (reject.reason, reject.detail) == ("auth", "")
    assert time.monotonic() - start_s >= 0.2


def test_a_recorded_handshake_cannot_be_replayed(end: End) -> None:
    first = RawWriter(end)
    hello = WriterHandshake(secrets=[SECRET], incarnation="raw", target="reader", compat=COMPAT, protocol="tcp")
    first.send(FrameType.HELLO, hello.hello)
    challenge = parse_body(FrameType.CHALLENGE, first.read(FrameType.CHALLENGE)[1], Challenge)
    proof = hello.prove(challenge)
    first.send(FrameType.PROOF, proof)
    first.read(FrameType.WELCOME)
    second = RawWriter(end)
    second.send(FrameType.HELLO, hello.hello)
    second.read(FrameType.CHALLENGE)
    second.send(FrameType.PROOF, proof)
    assert parse_body(FrameType.REJECT, second.read(FrameType.REJECT)[1], Reject).reason == "auth"


@pytest.mark.parametrize(
    ("changes", "num_bytes", "reason"),
    [
        ({"serial": 77}, LAYER_BYTES, "bad_page"),
        ({"first": 2}, LAYER_BYTES, "bad_page"),
        ({"num_places": 3}, 3 * LAYER_BYTES, "bad_page"),
        ({"num_places": 0}, LAYER_BYTES, "bad_page"),
        ({"first": 2**32 - 1}, LAYER_BYTES, "bad_page"),
        ({"layer_hi": NUM_LAYERS + 1, "layer_lo": NUM_LAYERS}, LAYER_BYTES, "bad_page"),
        ({"layer_lo": 1}, LAYER_BYTES, "bad_page"),
        ({"epoch": 4}, LAYER_BYTES, "stale_epoch"),
        ({}, LAYER_BYTES - 1, "length"),
        ({}, 2 * LAYER_BYTES, "length"),
    ],
)
def test_data_out_of_bounds_writes_nothing(end: End, changes: dict[str, int], num_bytes: int, reason: str) -> None:
    writer = RawWriter(end).greet()
    grant = writer.reserve([3, 4])
    writer.sock.sendall(data_frame(good_data(grant, **changes), num_bytes) + b"\xff" * min(num_bytes, LAYER_BYTES))
    assert writer.is_closed()
    assert end.node.rejects() == {reason: 1}
    assert end.wait(BlocksFree).blocks == (3, 4)
    assert not any(end.region.buffer), "a byte was written"


@pytest.mark.parametrize(
    ("changes", "num_bytes", "reason"),
    [({}, 0, "bad_page"), ({"serial": 77}, 0, ""), ({}, 3, "body")],
    ids=["of-a-tcp-writer", "of-a-grant-that-is-over", "too-long"],
)
def test_a_notice_of_written_pages_hashes_only_what_its_writer_can_have_written(
    end: End, changes: dict[str, int], num_bytes: int, reason: str
) -> None:
    writer = RawWriter(end).greet()
    grant = writer.reserve([3, 4])
    sub = pushed_frame(good_data(grant, **changes))[HEADER.size :] + bytes(num_bytes)
    writer.sock.sendall(HEADER.pack(MAGIC, VERSION, FrameType.PUSHED, 0, len(sub)) + sub)
    if reason:
        assert writer.is_closed()
        assert end.wait(BlocksFree).blocks == (3, 4)
    else:
        writer.reserve([5], xfer="raw:2")  # the link lives
    assert end.node.rejects() == ({reason: 1} if reason else {})


def test_data_for_another_peers_grant_is_refused_and_leaves_that_peer_alone(end: End) -> None:
    victim = RawWriter(end).greet()
    grant = victim.reserve([3, 4])
    thief = RawWriter(end).greet()
    thief.sock.sendall(data_frame(good_data(grant), LAYER_BYTES) + b"\xff" * 100)
    assert thief.is_closed()
    assert end.node.grants()["LEASED"] == 2
    assert not any(end.region.buffer)


@pytest.mark.parametrize(
    "kind",
    [
        FrameType.HELLO,
        FrameType.CHALLENGE,
        FrameType.PROOF,
        FrameType.WELCOME,
        FrameType.REJECT,
        FrameType.GRANT,
        FrameType.REFUSED,
        FrameType.HANDED,
        FrameType.FENCE,
    ],
)
def test_a_frame_that_no_writer_sends_after_the_handshake_costs_the_link(end: End, kind: FrameType) -> None:
    """A second HELLO, or what only a receiver may say."""
    writer = RawWriter(end).greet()
    writer.reserve([3])
    writer.sock.sendall(HEADER.pack(MAGIC, VERSION, kind, 0, 1) + b"\x90")
    assert writer.is_closed()
    assert end.node.rejects() == {"state": 1}
    assert end.wait(BlocksFree).blocks == (3,)


def test_pages_after_an_abort_are_refused_and_not_written(end: End) -> None:
    writer = RawWriter(end).greet()
    grant = writer.reserve([3])
    writer.send(FrameType.ABORT, FenceBody("raw:1", grant.grant_id))
    assert end.wait(BlocksFree).blocks == (3,)
    writer.sock.sendall(data_frame(good_data(grant), LAYER_BYTES) + b"\xff" * LAYER_BYTES)
    assert writer.is_closed()
    assert end.node.rejects() == {"bad_page": 1}
    assert not any(end.region.buffer), "a page was written that nobody had granted any more"


def test_a_page_that_comes_again_with_other_bytes_never_arrives(end: End) -> None:
    writer = RawWriter(end).greet()
    grant = writer.reserve([3])
    page = bytes(NUM_LAYERS * LAYER_BYTES)
    whole = data_frame(good_data(grant, layer_hi=NUM_LAYERS), len(page))
    end.region.block(7)[:] = page
    checksum = TransferChecksum(xfer="raw:1", epoch=5, num_tokens=32, state=b"")
    for _ in checksum.update(end.region, [7], 1 << 30):
        pass
    commit = Commit("raw:1", grant.grant_id, 5, 32, 1, checksum.value(), b"", len(page), 0.0)
    writer.sock.sendall(whole + page + whole + page[:-1] + b"\x01")
    writer.send(FrameType.COMMIT, commit)
    refused = parse_body(FrameType.REFUSED, writer.read(FrameType.REFUSED)[1], RefusedBody)
    assert refused.reason == "checksum"
    again = writer.reserve([3], xfer="raw:2")
    checksum = TransferChecksum(xfer="raw:2", epoch=5, num_tokens=32, state=b"")
    for _ in checksum.update(end.region, [7], 1 << 30):
        pass
    whole = data_frame(good_data(again, layer_hi=NUM_LAYERS), len(page))
    writer.sock.sendall((whole + page) * 2)  # the same bytes: harmless
    writer.send(FrameType.COMMIT, Commit("raw:2", again.grant_id, 5, 32, 1, checksum.value(), b"", len(page), 0.0))
    assert end.wait(Arrived).xfer == "raw:2"


def test_strangers_do_not_keep_a_writer_out(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    """All places are taken by connections that say nothing: the one that has waited longest goes."""
    monkeypatch.setattr(receiver, "MAX_LINKS", 8)
    strangers = [RawWriter(end) for _ in range(20)]
    writer = RawWriter(end).greet()
    writer.reserve([1])
    assert end.node.rejects()["too_many_links"] >= 12
    for stranger in strangers:
        stranger.sock.close()


def test_one_peer_has_few_links(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "MAX_LINKS_PER_PEER", 3)
    writers = [RawWriter(end).greet() for _ in range(3)]
    one_more = RawWriter(end)
    with pytest.raises(HandshakeRefused, match="too_many_links"):
        one_more.greet()
    writers[0].sock.close()
    writers[1].reserve([1])
    for writer in [*writers, one_more]:
        writer.sock.close()


def test_a_truncated_frame_then_eof_frees_the_grant(end: End) -> None:
    writer = RawWriter(end).greet()
    grant = writer.reserve([3])
    writer.sock.sendall(data_frame(good_data(grant), LAYER_BYTES) + b"\xff" * 1000)
    writer.sock.close()
    assert end.wait(BlocksFree).blocks == (3,)


@pytest.mark.parametrize(
    ("commit", "reason"),
    [
        ({"epoch": 4}, "stale_epoch"),
        ({"num_blocks": 3}, "incomplete"),
        ({"num_blocks": 0}, "incomplete"),
        ({}, "incomplete"),  # no data came at all
        ({"grant_id": "reader.99"}, "unknown_grant"),
    ],
)
def test_a_false_commit_never_arrives(end: End, commit: dict[str, object], reason: str) -> None:
    writer = RawWriter(end).greet()
    grant = writer.reserve([3, 4])
    fields = {"xfer": "raw:1", "grant_id": grant.grant_id, "epoch": 5, "num_tokens": 60, "num_blocks": 2} | commit
    writer.send(FrameType.COMMIT, Commit(checksum=0, state=b"", num_bytes=0, transfer_s=0.0, **fields))  # type: ignore[arg-type]
    refused = parse_body(FrameType.REFUSED, writer.read(FrameType.REFUSED)[1], RefusedBody)
    assert refused.reason == reason
    assert not end.sees(Arrived, within_s=0.1)


def test_thousands_of_idle_and_garbage_connections_leave_a_live_transfer_alone(end: End, tmp_path: Path) -> None:
    idle = [RawWriter(end) for _ in range(100)]
    for _ in range(50):
        RawWriter(end).sock.close()
    writer = End("writer", str(tmp_path), ["tcp"])
    try:
        writer.reserve(end.address, "w:1", 1)
        end.node.grant(end.wait(ReserveRequested), [1])
        writer.wait(GrantReceived)
        writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
        writer.node.commit("w:1", src_blocks=[0], num_tokens=32, state=b"")
        end.wait(Arrived)
    finally:
        writer.close()
        for raw in idle:
            raw.sock.close()
