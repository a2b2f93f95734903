"""More slow clients than gateway threads: each is let go at its deadline, and normal service goes on."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from engines.tokenizer import Tokenizer
from kvstore.readable import wait_readable
from kvstore.state import EmbeddedValkey
from tests.gateway_harness import TINY_CHAT, LiveGateway, Publisher
from tests.stopwatch import Stopwatch
from webapp.server import HEAD_DEADLINE_S

NUM_THREADS = 12
GOOD = {"prompt": "Hi", "max_tokens": 2}


@pytest.fixture(scope="module")
def gateway(valkey_server: EmbeddedValkey) -> Iterator[LiveGateway]:
    publisher = Publisher(valkey_server.url, Tokenizer.from_folder(TINY_CHAT), "ok")
    publisher.start()
    gateway = LiveGateway(valkey_server.url, threads=NUM_THREADS)
    yield gateway
    gateway.stop()
    publisher.stop()


def _open(gateway: LiveGateway, first_bytes: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", gateway.port), timeout=5)
    client.sendall(first_bytes)
    return client


def _drip_until_closed(clients: list[socket.socket], limit_s: float) -> list[socket.socket]:
    """One byte each, a few times a second, until the server has closed them. Returns those still open at the limit."""
    end_s = time.monotonic() + limit_s
    still_open = list(clients)
    while still_open and time.monotonic() < end_s:
        readable = wait_readable(still_open, 0.25)
        for client in readable:
            try:
                is_closed = client.recv(65536) == b""
            except OSError:
                is_closed = True
            if is_closed:
                still_open.remove(client)
        for client in still_open:
            with contextlib.suppress(OSError):
                client.send(b"a")
    return still_open


HEAD_WITHOUT_END = b"GET /v1/models HTTP/1.1\r\nHo"
REFUSED_BODY = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n{"
BODY_FOR_NO_ROUTE = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
ASKED_TO_CLOSE = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def test_clients_that_send_a_byte_now_and_then_are_let_go(gateway: LiveGateway) -> None:
    clients = [
        _open(gateway, first_bytes)
        for first_bytes in (HEAD_WITHOUT_END, REFUSED_BODY, BODY_FOR_NO_ROUTE)
        for _ in range(NUM_THREADS)
    ]

    still_open = _drip_until_closed(clients, limit_s=4 * HEAD_DEADLINE_S)

    assert still_open == []
    reply = gateway.client.post("/v1/completions", json=GOOD)
    assert reply.status_code == 200, reply.text


def test_clients_that_leave_an_ended_connection_open_delay_nobody(gateway: LiveGateway) -> None:
    clients = [_open(gateway, ASKED_TO_CLOSE) for _ in range(NUM_THREADS // 2)]
    for client in clients:
        assert client.recv(65536).startswith(b"HTTP/1.1 200")

    with Stopwatch() as watch:
        reply = _open(gateway, ASKED_TO_CLOSE).recv(65536)

    assert reply.startswith(b"HTTP/1.1 200")
    watch.assert_within(2.0)  # none of them holds up the thread that accepts
    for client in clients:
        client.close()
