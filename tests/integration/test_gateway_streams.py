"""Streams through trouble: a client that leaves, a resumed client, lost hints, a lost record, an outage, a shutdown."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
import redis

from engines.tokenizer import Tokenizer
from kvstore.state import EmbeddedValkey
from tests.gateway_harness import TINY_CHAT, LiveGateway, Publisher, wait_until
from tests.stopwatch import Stopwatch

REPLY = "One, two, three, four, five, six, seven, eight."
BODY = {"prompt": "Hi", "max_tokens": 64, "stream": True, "return_token_ids": True}
URL = "/v1/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey(tmp_path_factory.mktemp("stream-valkey"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def gateway(server: EmbeddedValkey) -> Iterator[LiveGateway]:
    gateway = LiveGateway(server.url)
    yield gateway
    gateway.stop()


@pytest.fixture
def publisher(server: EmbeddedValkey) -> Iterator[Publisher]:
    publisher = Publisher(server.url, Tokenizer.from_folder(TINY_CHAT), REPLY)
    publisher.start()
    yield publisher
    publisher.hold_at = 1 << 30
    publisher.stop()


class Reader:
    """Reads one stream in a thread of its own."""

    def __init__(self, gateway: LiveGateway, *, method: str = "POST", path: str = URL, **kwargs: Any) -> None:
        self.events: list[tuple[str, str, str]] = []  # (event, id, data)
        self.rid = ""
        self.status = 0
        self._client = httpx.Client(base_url=gateway.url, timeout=30, trust_env=False)
        self._kwargs = {"method": method, "url": path, **kwargs}
        self._reply: httpx.Response | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        event, event_id = "message", ""
        with contextlib.suppress(httpx.TransportError, httpx.StreamError), self._client.stream(**self._kwargs) as reply:
            self.status, self.rid, self._reply = reply.status_code, reply.headers["x-request-id"], reply
            for line in reply.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    event = value
                elif name == "id":
                    event_id = value
                elif name == "data":
                    self.events.append((event, event_id, value))
                    event, event_id = "message", ""

    def wait_for(self, num_events: int) -> None:
        wait_until(lambda: len(self.events) >= num_events, timeout_s=30, what=f"{num_events} events")

    def leave(self) -> None:
        """Closes the connection without reading on."""
        assert self._reply is not None
        stream = self._reply.extensions["network_stream"]
        stream.get_extra_info("socket").shutdown(2)
        self._thread.join(10)

    def end(self) -> list[dict[str, Any]]:
        """All chunks, after the proper end."""
        self._thread.join(30)
        assert not self._thread.is_alive()
        assert self.events and self.events[-1][2] == "[DONE]", self.events[-3:]
        return [json.loads(data) for event, _, data in self.events if event == "message" and data != "[DONE]"]

    def ids(self) -> list[int]:
        return [i for chunk in self.end() for choice in chunk["choices"] for i in choice["token_ids"]]

    def error(self) -> dict[str, Any]:
        self.end()
        (data,) = [data for event, _, data in self.events if event == "error"]
        error: dict[str, Any] = json.loads(data)["error"]
        return error


def _state(gateway: LiveGateway, rid: str) -> str:
    state: str = gateway.client.get(f"/v1/requests/{rid}").json()["state"]
    return state


def test_a_client_that_leaves_cancels_its_request(gateway: LiveGateway, publisher: Publisher) -> None:
    publisher.hold_at = 3
    reader = Reader(gateway, json=BODY)
    reader.wait_for(2)
    with Stopwatch() as watch:
        reader.leave()
        wait_until(lambda: _state(gateway, reader.rid) == "cancelled", timeout_s=30, what="the request is cancelled")
    watch.assert_within(2.0)


def test_a_client_that_asked_to_continue_may_leave(gateway: LiveGateway, publisher: Publisher) -> None:
    publisher.hold_at = 3
    reader = Reader(gateway, json=BODY, headers={"x-on-disconnect": "continue"})
    reader.wait_for(2)
    reader.leave()
    publisher.hold_at = 1 << 30
    wait_until(lambda: _state(gateway, reader.rid) == "finished", timeout_s=30, what="the request is finished")


def test_a_resumed_client_gets_what_comes_after_its_position(gateway: LiveGateway, publisher: Publisher) -> None:
    publisher.hold_at = 5
    body = {**BODY, "n": 2, "stream_options": {"include_event_ids": True}}
    reader = Reader(gateway, json=body, headers={"x-on-disconnect": "continue"})
    reader.wait_for(6)
    reader.leave()
    event_id = [i for _, i, _ in reader.events if i][-1]
    seen = [json.loads(data) for _, _, data in reader.events]
    resumed = Reader(
        gateway, method="GET", path=f"/v1/requests/{reader.rid}/stream", headers={"Last-Event-ID": event_id}
    )
    wait_until(lambda: resumed.status == 200, timeout_s=30, what="the resumed stream has begun")
    publisher.hold_at = 1 << 30
    chunks = [*seen, *resumed.end()]
    for index in (0, 1):
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert [i for choice in own for i in choice["token_ids"]] == publisher.reply_ids
        assert "".join(choice["text"] for choice in own) == REPLY
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["stop"]


def test_positions_are_signed_and_belong_to_one_request(gateway: LiveGateway, publisher: Publisher) -> None:
    reader = Reader(gateway, json=BODY, headers={"x-stream-ids": "1"})
    assert reader.ids() == publisher.reply_ids
    path = f"/v1/requests/{reader.rid}/stream"
    event_id = [i for _, i, _ in reader.events if i][-1]
    for bad in ("x", event_id[:-1], "9" + event_id, "1-a-b"):
        reply = gateway.client.get(path, headers={"Last-Event-ID": bad})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "Last-Event-ID")
    assert gateway.client.get("/v1/requests/zzzz-s00/stream").status_code == 404
    again = Reader(gateway, method="GET", path=path)
    assert again.ids() == publisher.reply_ids


def test_lost_hints_are_healed_from_the_log(server: EmbeddedValkey, gateway: LiveGateway, publisher: Publisher) -> None:
    publisher.hold_at = 2
    reader = Reader(gateway, json=BODY)
    reader.wait_for(1)
    with redis.Redis.from_url(server.url) as raw:
        # Another target of the feed: hints of this request no longer come here.
        publisher.store.attach(reader.rid, "gw-nobody")
        publisher.hold_at = 1 << 30
        assert reader.ids() == publisher.reply_ids
        assert raw.ping()


def test_a_lost_record_is_accepted_again_and_the_client_sees_one_text(
    server: EmbeddedValkey, gateway: LiveGateway, publisher: Publisher
) -> None:
    publisher.hold_at = 4
    reader = Reader(gateway, json=BODY)
    reader.wait_for(3)
    with redis.Redis.from_url(server.url) as raw:
        raw.flushall()
    publisher.hold_at = 1 << 30
    assert reader.ids() == publisher.reply_ids
    assert "".join(c["choices"][0]["text"] for c in reader.end()) == REPLY


def test_a_stream_survives_a_state_server_that_dies(
    server: EmbeddedValkey, gateway: LiveGateway, publisher: Publisher
) -> None:
    publisher.hold_at = 4
    reader = Reader(gateway, json=BODY)
    reader.wait_for(3)
    wait_until(lambda: publisher.num_claims == 1, timeout_s=30, what="the request is claimed")
    os.kill(server.pid, signal.SIGSTOP)
    publisher.hold_at = 1 << 30
    timer = threading.Timer(2.5, os.kill, (server.pid, signal.SIGCONT))
    timer.start()
    timer.join()
    assert reader.ids() == publisher.reply_ids


def test_a_cancelled_stream_ends_with_an_error_event_and_done(gateway: LiveGateway, publisher: Publisher) -> None:
    publisher.hold_at = 3
    reader = Reader(gateway, json=BODY)
    reader.wait_for(2)
    assert gateway.client.delete(f"/v1/requests/cmpl-{reader.rid}").json()["state"] == "cancelled"
    assert reader.error()["code"] == "cancelled"
    assert gateway.client.post(f"/v1/requests/{reader.rid}/cancel").json()["state"] == "cancelled"


def test_a_deadline_ends_a_stream_and_a_whole_answer(gateway: LiveGateway, publisher: Publisher) -> None:
    publisher.hold_at = 1
    headers = {"x-request-timeout-ms": "400"}
    reader = Reader(gateway, json=BODY, headers=headers)
    assert reader.error()["code"] == "deadline_exceeded"
    whole = gateway.client.post(URL, json={**BODY, "stream": False}, headers=headers)
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "deadline_exceeded")


def test_shutting_down_ends_open_streams_with_an_error_event(server: EmbeddedValkey, publisher: Publisher) -> None:
    other = LiveGateway(server.url)
    try:
        publisher.hold_at = 3
        reader = Reader(other, json=BODY)
        reader.wait_for(2)
        other.process.send_signal(signal.SIGTERM)
        assert reader.error()["code"] == "draining"
        assert other.process.wait(60) == 0
    finally:
        other.stop()


def test_too_many_calls_at_once_are_refused_early(server: EmbeddedValkey, publisher: Publisher) -> None:
    small = LiveGateway(server.url, threads=18)  # 16 are kept for health and metrics
    try:
        publisher.hold_at = 1
        readers = [Reader(small, json=BODY) for _ in range(2)]
        for reader in readers:
            reader.wait_for(1)
        refused = small.client.post(URL, json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert small.client.get("/health").status_code == 200
        publisher.hold_at = 1 << 30
        assert all(reader.ids() == publisher.reply_ids for reader in readers)
    finally:
        small.stop()
