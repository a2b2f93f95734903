"""TLS under tcp: every byte right; a peer without the right certificate is refused by name, before a frame is read."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import msgspec
import pytest

from kvstore.address import KVAddress
from kvstore.transport import (
    Arrived,
    BlocksFree,
    GrantReceived,
    GrantRefused,
    Handed,
    PushFailed,
    ReserveRequested,
    Times,
)
from kvstore.transport.errors import TlsFilesError
from kvstore.transport.tls import Tls, TlsFiles
from tests.certificates import Ca, needs_openssl
from tests.contract.transport_helpers import End, fill, granted
from tests.contract.transport_peer import NUM_BLOCKS, NUM_LAYERS
from tests.faults.proxy import Proxy

pytestmark = needs_openssl


class MakeEnd(Protocol):
    def __call__(self, name: str, tls: TlsFiles | None, *, times: Times | None = None) -> End: ...


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Ca:
    return Ca(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def files(ca: Ca) -> TlsFiles:
    return ca.sign("node")


@pytest.fixture
def make_end(tmp_path: Path) -> Iterator[MakeEnd]:
    with contextlib.ExitStack() as stack:

        def make(name: str, tls: TlsFiles | None, *, times: Times | None = None) -> End:
            end = End(name, str(tmp_path), ["tcp"], tls=tls, times=times)
            stack.callback(end.close)
            return end

        yield make


def refusal(writer: End, reader: End) -> tuple[str, dict[str, int]]:
    """Why the writer got no grant, and what the reader counted."""
    writer.reserve(reader.address, "w:1", 1)
    reason = writer.wait(GrantRefused).reason
    for _ in range(100):
        if reader.node.rejects():
            break
        time.sleep(0.01)
    return reason, reader.node.rejects()


def test_all_blocks_arrive_byte_for_byte_over_tls(make_end: MakeEnd, files: TlsFiles) -> None:
    """All of the region, more than the socket takes at once, while the other direction talks as well."""
    writer, reader = make_end("writer", files), make_end("reader", files)
    fill(writer.region)
    for round_ in range(5):
        xfer = f"w:{round_}"
        order = list(range(NUM_BLOCKS))[:: -1 if round_ % 2 else 1]
        granted(writer, reader, xfer, order)
        for layer in range(NUM_LAYERS):
            writer.node.push(xfer, [(place, place) for place in range(NUM_BLOCKS)], layer, layer + 1)
        writer.node.commit(xfer, src_blocks=list(range(NUM_BLOCKS)), num_tokens=NUM_BLOCKS, state=os.urandom(1 << 20))
        reader.wait(Arrived)
        for place, block in enumerate(order):
            assert reader.region.block(block) == writer.region.block(place)
        reader.node.settle(xfer, True)
        writer.wait(Handed)
    assert reader.node.counters()["arrived_bytes"] == 5 * writer.region.num_bytes
    assert writer.node.counters()["links_tcp"] == 1


def test_an_abandoned_transfer_does_not_garble_the_link(make_end: MakeEnd, files: TlsFiles) -> None:
    """What OpenSSL has encrypted must be sent, also when its transfer is over."""
    writer, reader = make_end("writer", files), make_end("reader", files)
    fill(writer.region)
    pairs = [(place, place) for place in range(NUM_BLOCKS)]
    for attempt in range(30):
        granted(writer, reader, f"w:{attempt}", list(range(NUM_BLOCKS)))
        for _ in range(4):
            writer.node.push(f"w:{attempt}", pairs, 0, NUM_LAYERS)
        writer.node.abandon(f"w:{attempt}")
        reader.wait(BlocksFree)
    assert reader.node.rejects() == {}
    assert not any(isinstance(event, PushFailed) for event in writer.events)


def test_the_bytes_on_the_wire_are_not_the_pages(make_end: MakeEnd, files: TlsFiles) -> None:
    """Seen by a relay in between; the same transfer without TLS shows the pages, so the check can fail."""
    for tls in (files, None):
        writer, reader = make_end(f"writer-{tls is None}", tls), make_end(f"reader-{tls is None}", tls)
        writer.region.buffer[:] = b"plain as day    " * (writer.region.num_bytes // 16)
        seen: list[bytes] = []
        with Proxy(reader.address.tcp_port) as relay:
            relay.to_receiver.edit = lambda piece, seen=seen: seen.append(piece) or piece  # type: ignore[misc]
            writer.reserve(at_port(reader, relay.port), "w:1", 1)
            reader.node.grant(reader.wait(ReserveRequested), [0])
            writer.wait(GrantReceived)
            writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
            writer.node.commit("w:1", src_blocks=[0], num_tokens=1, state=b"")
            reader.wait(Arrived)
        assert (b"plain as day" in b"".join(seen)) == (tls is None)


def test_a_certificate_of_another_ca_is_refused_by_both_ends(make_end: MakeEnd, ca: Ca, tmp_path: Path) -> None:
    foreign = Ca(tmp_path, "foreign").sign("node", trusts=ca.path)  # it believes ours; we do not believe it
    reason, counted = refusal(make_end("writer", foreign), make_end("reader", ca.sign("node2")))
    assert (reason, counted) == ("certificate_refused", {"certificate_unknown": 1})
    reason, counted = refusal(make_end("writer2", ca.sign("node3")), make_end("reader2", foreign))
    assert (reason, counted) == ("certificate_unknown", {"certificate_refused": 1})


def test_an_expired_certificate_is_refused_by_name(make_end: MakeEnd, ca: Ca, files: TlsFiles) -> None:
    expired = ca.sign("expired", days=-1)
    reason, counted = refusal(make_end("writer", expired), make_end("reader", files))
    assert (reason, counted) == ("certificate_refused", {"certificate_expired": 1})
    reason, counted = refusal(make_end("writer2", files), make_end("reader2", expired))
    assert (reason, counted) == ("certificate_expired", {"certificate_refused": 1})


def test_a_certificate_of_another_host_is_refused_unless_hosts_are_not_checked(
    make_end: MakeEnd, ca: Ca, files: TlsFiles
) -> None:
    elsewhere = ca.sign("elsewhere", host="192.0.2.1")
    reason, _ = refusal(make_end("writer", files), make_end("reader", elsewhere))
    assert reason == "certificate_host"
    writer, reader = make_end("writer2", replace(files, check_host=False)), make_end("reader2", elsewhere)
    writer.reserve(reader.address, "w:1", 1)
    reader.wait(ReserveRequested)


def test_a_plain_writer_and_a_tls_receiver_refuse_each_other(make_end: MakeEnd, files: TlsFiles) -> None:
    reason, counted = refusal(make_end("writer", None), make_end("reader", files))
    assert (reason, counted) == ("not_tls", {"not_tls": 1})


def test_a_tls_writer_and_a_plain_receiver_refuse_each_other(make_end: MakeEnd, files: TlsFiles) -> None:
    reason, counted = refusal(make_end("writer", files), make_end("reader", None))
    assert (reason, counted) == ("not_tls", {"bad_magic": 1})


def test_a_peer_that_shows_no_certificate_is_refused(make_end: MakeEnd, files: TlsFiles) -> None:
    reader = make_end("reader", files)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(files.ca)
    address = (reader.address.tcp_host, reader.address.tcp_port)
    with socket.create_connection(address, timeout=5) as sock, pytest.raises(ssl.SSLError, match="CERTIFICATE_REQ"):
        context.wrap_socket(sock, server_hostname=address[0]).recv(1)
    assert reader.node.rejects() == {"certificate_missing": 1}


def test_garbage_and_silence_in_place_of_tls_end_in_bounded_time(make_end: MakeEnd, files: TlsFiles) -> None:
    reader = make_end("reader", files, times=Times(handshake_s=0.4))
    address = (reader.address.tcp_host, reader.address.tcp_port)
    for start in (b"", b"\x16\x03\x01\x40\x00" + bytes(100), os.urandom(200)):
        with socket.create_connection(address, timeout=5) as sock:
            sock.sendall(start)
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(1 << 16):
                    pass


def test_files_that_cannot_be_used_are_named(ca: Ca, files: TlsFiles, tmp_path: Path) -> None:
    other = ca.sign("other")
    (tmp_path / "text").write_text("not PEM")
    for bad, setting in (
        (replace(files, ca=str(tmp_path / "none")), "transfer.tls_ca"),
        (replace(files, ca=str(tmp_path / "text")), "transfer.tls_ca"),
        (replace(files, certificate=str(tmp_path / "text")), "transfer.tls_certificate"),
        (replace(files, key=other.key), "transfer.tls_certificate"),
    ):
        with pytest.raises(TlsFilesError) as caught:
            Tls(bad)
        assert caught.value.setting == setting


def at_port(reader: End, port: int) -> KVAddress:
    return msgspec.structs.replace(reader.address, tcp_port=port)
