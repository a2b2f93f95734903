"""kill -9 of the gateway with live streams: its requests run on, and the new gateway resumes each stream exactly."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import httpx2 as httpx
import pytest

from tests.chaos.live_streams import MAX_TOKENS, MAX_TRIES, bodies
from tests.cluster import Cluster, are_in_midst, read_streams, running_cluster, wait_until

pytestmark = pytest.mark.chaos

NUM_STREAMS = 8
TIMEOUT = aiohttp.ClientTimeout(total=240)
ASK_FOR_IDS = {"x-stream-ids": "1"}


@dataclass
class Client:
    """What one client has got, over all its connections."""

    request_id: str = ""
    last_event_id: str = ""
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    num_done: int = 0

    async def read(self, response: aiohttp.ClientResponse) -> None:
        """To the end of the connection, whatever ends it."""
        self.request_id = self.request_id or response.headers["x-request-id"]
        event_id = ""
        async for raw in response.content:
            line = raw.decode().rstrip("\n")
            if line.startswith("id: "):
                event_id = line[4:]
            elif line == "data: [DONE]":
                self.num_done += 1
            elif line.startswith("data: "):
                for choice in json.loads(line[6:])["choices"]:
                    self.text += choice["text"]
                    self.token_ids += choice.get("token_ids") or []
                self.last_event_id = event_id


async def _until_cut(url: str, clients: list[Client], gateway_pid: int) -> bool:
    """Starts the streams and kills the gateway when each has brought some tokens. False: one had ended before that."""

    async def stream(client: Client, body: dict[str, object]) -> None:
        full = {**body, "stream": True, "return_token_ids": True}
        async with session.post(f"{url}/v1/completions", json=full, headers=ASK_FOR_IDS) as response:
            await client.read(response)

    async with aiohttp.ClientSession(timeout=TIMEOUT) as session:
        started = zip(clients, bodies(num_streams=NUM_STREAMS), strict=True)
        tasks = [asyncio.create_task(stream(client, body)) for client, body in started]
        for _ in range(12000):
            if are_in_midst([len(client.token_ids) for client in clients], [MAX_TOKENS] * NUM_STREAMS, after_tokens=3):
                break
            await asyncio.sleep(0.005)
        os.kill(gateway_pid, signal.SIGKILL)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(end is None or isinstance(end, aiohttp.ClientError) for end in ends), ends
    return None not in ends


async def _resume(url: str, clients: list[Client]) -> None:
    async def resume(client: Client) -> None:
        headers = {"Last-Event-ID": client.last_event_id}
        async with session.get(f"{url}/v1/requests/{client.request_id}/stream", headers=headers) as response:
            assert response.status == 200, await response.text()
            await client.read(response)

    async with aiohttp.ClientSession(timeout=TIMEOUT) as session:
        await asyncio.gather(*[resume(client) for client in clients])


def _kill_gateway(cluster: Cluster, clients: list[Client]) -> bool:
    """Amid the streams of `clients`, and waits for the next one. False: not amid all of them."""
    former_pid = cluster.status()["gateway"][0]["pid"]
    is_in_midst = asyncio.run(_until_cut(cluster.url, clients, former_pid))
    wait_until(lambda: cluster.status()["gateway"][0]["pid"] != former_pid, timeout_s=60, what="a new gateway")
    assert cluster.status()["gateway"][0]["url"] == cluster.url
    wait_until(lambda: _answers(cluster.url), timeout_s=60, what="it answers")
    return is_in_midst


def test_streams_of_a_killed_gateway_are_resumed_without_gap_or_repeat(tmp_path: Path) -> None:
    with running_cluster(tmp_path, "--dtype", "float32") as cluster:
        undisturbed = asyncio.run(read_streams(cluster.url, bodies(num_streams=NUM_STREAMS)))
        for _ in range(MAX_TRIES):
            clients = [Client() for _ in range(NUM_STREAMS)]
            is_in_midst = _kill_gateway(cluster, clients)
            if is_in_midst:
                break
        assert is_in_midst, f"a stream ended before the kill, {MAX_TRIES} times"
        asyncio.run(_resume(cluster.url, clients))

        for before, client in zip(undisturbed, clients, strict=True):
            assert client.token_ids == before.token_ids[0]
            assert client.text == before.texts[0]
            assert client.num_done == 1
        wait_until(lambda: not any(cluster.blocks_in_use().values()), timeout_s=30, what="every block free again")


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=30, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
