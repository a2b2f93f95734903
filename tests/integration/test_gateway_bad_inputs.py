"""Bad inputs over the wire: each gets its status, code and param, and a normal request right after is served."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from engines.tokenizer import Tokenizer
from kvstore.state import EmbeddedValkey
from tests.gateway_harness import TINY_CHAT, LiveGateway, Publisher, wait_until

JSON = {"Content-Type": "application/json"}
GOOD = {"prompt": "Hi", "max_tokens": 2}
LIMIT = 1 << 20
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def gateway(valkey_server: EmbeddedValkey) -> Iterator[LiveGateway]:
    publisher = Publisher(valkey_server.url, Tokenizer.from_folder(TINY_CHAT), "ok")
    publisher.start()
    gateway = LiveGateway(valkey_server.url, max_body_bytes=LIMIT)
    yield gateway
    gateway.stop()
    publisher.stop()


@pytest.fixture(autouse=True)
def _serves_afterwards(gateway: LiveGateway) -> Iterator[None]:
    yield
    assert gateway.client.post("/v1/completions", json=GOOD).status_code == 200
    assert "celeriac_open_calls 0.0" in gateway.client.get("/metrics").text


def _error(reply: Any, status: int, code: str) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    assert reply.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (b'{"model":', "malformed_json", "line 1 column"),
        (b"", "malformed_json", "empty"),
        (b"null", "invalid_type", "JSON object"),
        (b"[]", "invalid_type", "JSON object"),
        (b'"x"', "invalid_type", "JSON object"),
        (b"1", "invalid_type", "JSON object"),
        (b'{"prompt":"a","temperature":NaN}', "malformed_json", "NaN"),
        (b'{"prompt":"a","temperature":-Infinity}', "malformed_json", "Infinity"),
        (b'{"prompt":"a","temperature":1e999}', "out_of_range", "temperature"),
        (b'{"prompt":"a","max_tokens":' + b"9" * 5000 + b"}", "out_of_range", "max_tokens"),
        (b'{"prompt":"a","seed":9223372036854775808}', "out_of_range", "64-bit"),
        (b'{"prompt":"a","max_tokens":16.5}', "invalid_type", "integer"),
        (b'{"prompt":"a","max_tokens":"16"}', "invalid_type", "integer"),
        (b'{"prompt":"a","max_tokens":true}', "invalid_type", "integer"),
        (b"[" * 65, "malformed_json", "64"),
        (b'{"a":' * 1500, "malformed_json", "64"),
        (b"[" * 100_000, "malformed_json", "64"),
        (b'{"n":1,"n":2}', "malformed_json", "twice"),
        (b'{"prompt":"\xff"}', "malformed_json", "UTF-8"),
        ('{"prompt":"a"}'.encode("utf-16"), "malformed_json", "UTF-8"),
        (b'{"prompt":"\\ud800"}', "invalid_value", "surrogate"),
        (b'{"prompt":"a\x01"}', "malformed_json", "control"),
        (b'{"prompt":"a"} x', "malformed_json", "Extra data"),
    ],
)
def test_a_malformed_body_is_refused_by_name(gateway: LiveGateway, body: bytes, code: str, words: str) -> None:
    reply = gateway.client.post("/v1/completions", content=body, headers=JSON)
    assert words in _error(reply, 400, code)["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":"a","max_tokens":2.0}',
        b'\xef\xbb\xbf{"prompt":"a","max_tokens":2}',
        b'{"prompt":"a\\u0000b","max_tokens":2}',
    ],
)
def test_what_only_looks_odd_is_served(gateway: LiveGateway, body: bytes) -> None:
    assert gateway.client.post("/v1/completions", content=body, headers=JSON).status_code == 200


def test_a_body_over_the_limit_is_refused_before_it_is_read(gateway: LiveGateway) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {LIMIT + 1}"
    answer = _raw(gateway, head.encode() + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"body_too_large"' in answer
    assert b"Connection: close" in answer


def test_expecting_100_continue_with_too_large_a_body_gets_413_only(gateway: LiveGateway) -> None:
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
        f"Content-Length: {LIMIT + 1}\r\n\r\n"
    )
    assert _raw(gateway, head.encode()).startswith(b"HTTP/1.1 413")


def test_a_chunked_body_is_served_and_stopped_at_the_limit(gateway: LiveGateway) -> None:
    def chunks(size: int) -> Iterator[bytes]:
        yield b'{"max_tokens":2,"prompt":"Hi","user":"'
        for _ in range(size // 1000):
            yield b"x" * 1000
        yield b'"}'

    small = gateway.client.post("/v1/completions", content=chunks(5000), headers=JSON)
    assert small.status_code == 200
    _error(gateway.client.post("/v1/completions", content=chunks(LIMIT + 5000), headers=JSON), 413, "body_too_large")


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: -1",
        b"Content-Length: x",
        b"Content-Length: 1\r\nContent-Length: 2",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Bad Header: 1",
    ],
)
def test_heads_that_could_smuggle_get_400_and_a_closed_connection(gateway: LiveGateway, head: bytes) -> None:
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + head + b"\r\n\r\n0\r\n\r\n"
    )
    answer = _raw(gateway, request)
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("content_type", ["text/plain", "", "application/json; charset=latin-1", "multipart/form-data"])
def test_other_content_types_get_415(gateway: LiveGateway, content_type: str) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    reply = gateway.client.post("/v1/completions", content=b'{"prompt":"a"}', headers=headers)
    assert "application/json" in _error(reply, 415, "unsupported_media_type")["message"]


def test_compressed_bodies_get_415(gateway: LiveGateway) -> None:
    body = gzip.compress(json.dumps(GOOD).encode())
    reply = gateway.client.post("/v1/completions", content=body, headers={**JSON, "Content-Encoding": "gzip"})
    _error(reply, 415, "unsupported_media_type")


@pytest.mark.parametrize("path", ["/nowhere", "/v1/models/", "//v1//models", "/v1/../admin", "/%00", "/v1/embeddings"])
def test_unknown_paths_get_404_as_json(gateway: LiveGateway, path: str) -> None:
    answer = _raw(gateway, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404"), answer[:200]
    assert b'"code":"' in answer


@pytest.mark.parametrize("method", ["GET", "OPTIONS", "PUT", "FOO"])
def test_wrong_methods_get_405_with_allow(gateway: LiveGateway, method: str) -> None:
    reply = gateway.client.request(method, "/v1/completions")
    _error(reply, 405, "method_not_allowed")
    assert "POST" in reply.headers["allow"]


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM", b"hello"])
def test_what_is_no_http_closes_the_connection(gateway: LiveGateway, garbage: bytes) -> None:
    answer = _raw(gateway, garbage + b"\r\n\r\n")
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer[:100]


def test_a_client_that_leaves_within_its_body_frees_its_thread(gateway: LiveGateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port)) as sock:
        sock.sendall(POST + b"Content-Length: 100\r\n\r\n{")
    idle = "celeriac_open_calls 0.0"
    wait_until(lambda: idle in gateway.client.get("/metrics").text, timeout_s=30, what="no call is open")


def _raw(gateway: LiveGateway, request: bytes) -> bytes:
    """Sends bytes as they are and reads until the server closes, at most 5 s."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as sock:
        sock.sendall(request)
        answer = b""
        try:
            while part := sock.recv(65536):
                answer += part
        except (TimeoutError, ConnectionResetError):
            pass
    return answer
