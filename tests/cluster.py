"""A real cluster for tests: `celeriac up` in a run folder of its own, driven through its HTTP API and its status."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx2 as httpx

ROOT = Path(__file__).resolve().parent.parent
TINY_CHAT = ROOT / "models" / "tiny-chat"
START_S = 240  # many times what a start takes, for a machine that has much else to do


@dataclass
class Stream:
    """What one SSE stream brought. `ends` counts terminal events: exactly one is right."""

    token_ids: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish_reasons: list[str | None] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    num_done: int = 0
    request_id: str = ""
    stamps_s: list[float] = field(default_factory=list)


class Cluster:
    """One running cluster. `status()` tells pids; `client` speaks plain HTTP to it."""

    def __init__(self, run_dir: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.run_dir = run_dir
        self.env = {**os.environ, "XDG_STATE_HOME": str(run_dir / "state"), **(env or {})}
        self._flags = flags
        self.url = ""

    def cli(self, *args: str, timeout: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "celeriac", *args]
        result = subprocess.run(
            command, env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and result.returncode:
            raise AssertionError(f"{' '.join(args)} left with {result.returncode}:\n{result.stdout}\n{result.stderr}")
        return result

    def start(self) -> None:
        self.cli(
            "up", "--detach", "--run-dir", str(self.run_dir), "--port", "0", "--flower-port", "0", *self._flags,
            timeout=START_S,
        )  # fmt: skip
        self.url = self.status()["gateway"][0]["url"]

    def stop(self) -> None:
        self.cli("down", "--run-dir", str(self.run_dir), check=False)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.cli("status", "--json", "--run-dir", str(self.run_dir)).stdout)
        return status

    def worker(self, role: str) -> dict[str, Any]:
        return next(worker for worker in self.status()["workers"] if worker["role"] == role)

    def logs(self) -> str:
        """The ends of all logs, for a failing test's message."""
        parts = []
        for path in sorted((self.run_dir / "logs").glob("*")):
            parts.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-25:]))
        return "\n".join(parts)

    def post(self, path: str, body: dict[str, Any], **kwargs: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=120, trust_env=False, **kwargs)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, trust_env=False)

    def complete_ids(self, prompt_ids: list[int], max_tokens: int, **fields: Any) -> list[int]:
        """Greedy completion of token ids, as ids."""
        body = {"prompt": prompt_ids, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True, **fields}
        response = self.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        ids: list[int] = response.json()["choices"][0]["token_ids"]
        return ids

    def blocks_in_use(self) -> dict[str, float]:
        """`celeriac_kv_blocks` of every state but free and cached, summed over the workers."""
        used: dict[str, float] = {}
        for line in self.get("/metrics").text.splitlines():
            if line.startswith("celeriac_kv_blocks{"):
                state = line.split('state="')[1].split('"')[0]
                if state not in ("free", "cached"):
                    used[state] = used.get(state, 0) + float(line.rsplit(" ", 1)[1])
        return used


@contextlib.contextmanager
def running_cluster(run_dir: Path, *flags: str, env: dict[str, str] | None = None) -> Iterator[Cluster]:
    cluster = Cluster(run_dir, *flags, env=env)
    try:
        cluster.start()
        yield cluster
    except BaseException:
        print(cluster.logs())
        raise
    finally:
        cluster.stop()


def wait_until(claim: Callable[[], object], *, timeout_s: float, what: str) -> None:
    """Poll `claim` until it holds; at most `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, str]]:
    event = "message"
    async for raw in response.content:
        line = raw.decode().rstrip("\n")
        if line.startswith("event: "):
            event = line[7:]
        elif line.startswith("data: "):
            yield event, line[6:]
            event = "message"


async def read_stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any], stream: Stream) -> Stream:
    """POST one streaming completion and read it to its end, into `stream`."""
    async with session.post(f"{url}/v1/completions", json={**body, "stream": True, "return_token_ids": True}) as reply:
        assert reply.status == 200, await reply.text()
        stream.request_id = reply.headers.get("x-request-id", "")
        async for event, data in _events(reply):
            stream.stamps_s.append(time.monotonic())
            if data == "[DONE]":
                stream.num_done += 1
            elif event == "error":
                stream.errors.append(json.loads(data)["error"])
            else:
                _take_chunk(stream, json.loads(data))
    return stream


def _empty_stream(body: dict[str, Any]) -> Stream:
    num_choices = int(body.get("n", 1))
    return Stream([[] for _ in range(num_choices)], [""] * num_choices, [None] * num_choices)


def _take_chunk(stream: Stream, chunk: dict[str, Any]) -> None:
    for choice in chunk["choices"]:
        index = choice["index"]
        stream.texts[index] += choice["text"]
        stream.token_ids[index] += choice.get("token_ids") or []
        if choice["finish_reason"] is not None:
            assert stream.finish_reasons[index] is None, "a second end of one choice"
            stream.finish_reasons[index] = choice["finish_reason"]


def are_in_midst(counts: list[int], max_tokens: list[int], after_tokens: int) -> bool:
    """Each stream has `after_tokens` tokens, or the first of them is half way.

    So on a machine that starts some streams late, none has ended when a fault comes.
    """
    half_ways = [max(after_tokens, limit // 2) for limit in max_tokens]
    return min(counts) >= after_tokens or any(n >= half_way for n, half_way in zip(counts, half_ways, strict=True))


async def read_streams(
    url: str,
    bodies: list[dict[str, Any]],
    *,
    meanwhile: Callable[[], object] | None = None,
    after_s: float = 0.0,
    after_tokens: int = 0,
) -> list[Stream]:
    """All streams at once; `meanwhile` runs in a thread, after `after_s` and once `are_in_midst`."""
    timeout = aiohttp.ClientTimeout(total=560)
    connector = aiohttp.TCPConnector(limit=0)
    streams = [_empty_stream(body) for body in bodies]
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        reads = [read_stream(session, url, body, stream) for body, stream in zip(bodies, streams, strict=True)]
        tasks = [asyncio.create_task(read) for read in reads]
        if meanwhile is not None:
            await asyncio.sleep(after_s)
            limits = [int(body["max_tokens"]) for body in bodies]
            while not are_in_midst([len(stream.token_ids[0]) for stream in streams], limits, after_tokens):
                assert not all(task.done() for task in tasks), f"all streams ended early: {streams}"
                await asyncio.sleep(0.005)
            await asyncio.to_thread(meanwhile)
        return list(await asyncio.gather(*tasks))
