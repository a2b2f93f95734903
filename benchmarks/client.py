"""One streamed completion, timed: what a user of the HTTP API sees."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.errors import ServerUnusable
from benchmarks.load import PlannedRequest

REQUEST_TIMEOUT_S = 600.0
STAMPS_AFTER_S = 0.1
_WORDS = """river mountain valley village city harbor island desert meadow garden castle tower bridge market school
library museum station theater bakery farm mill cave beach lake swamp hill field orchard palace temple square street
kitchen cellar attic workshop hospital lighthouse hotel restaurant park ship tent cabin barn lamp book key map boat rope
coin bell clock mirror letter lantern basket bucket hammer needle button candle ladder bottle spoon cup plate"""


@dataclass
class RequestRecord:
    """One request as it went. Times are monotonic seconds; `error` is "" when it ended properly.

    Attributes:
        due_s: when the plan wanted it sent.
        sent_s: when it was ready to go out. Under a concurrency limit it then still waits for a place, and that wait is
            part of its latencies.
        token_stamps_s: arrival of each event that carried tokens (one event may carry several tokens).
        phases_ms: the server's own stamps, from `GET /v1/requests/{id}`.
    """

    planned: PlannedRequest
    due_s: float = 0.0
    sent_s: float = 0.0
    end_s: float = 0.0
    token_stamps_s: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    request_id: str = ""
    error: str = ""
    phases_ms: dict[str, float] = field(default_factory=dict)

    @property
    def lag_ms(self) -> float:
        """How late the load generator itself was."""
        return (self.sent_s - self.due_s) * 1000

    @property
    def ttft_ms(self) -> float:
        return (self.token_stamps_s[0] - self.sent_s) * 1000

    @property
    def e2e_ms(self) -> float:
        return (self.end_s - self.sent_s) * 1000

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per output token after the first; None for fewer than two tokens."""
        if self.num_output_tokens < 2:
            return None
        return (self.token_stamps_s[-1] - self.token_stamps_s[0]) * 1000 / (self.num_output_tokens - 1)

    @property
    def itl_ms(self) -> list[float]:
        """Gaps between successive token events."""
        stamps = self.token_stamps_s
        return [(b - a) * 1000 for a, b in itertools.pairwise(stamps)]


class Client:
    """Talks to one server. Owned by one event loop."""

    def __init__(self, url: str, session: aiohttp.ClientSession, *, concurrency_limit: int = 0) -> None:
        """`concurrency_limit`: requests in flight at most; 0 is no limit."""
        self.url = url.rstrip("/")
        self._places = asyncio.Semaphore(concurrency_limit or 1_000_000)
        self._session = session
        self._model = ""
        self._word_ids: list[int] = []

    async def prepare(self) -> str:
        """Find the model and ids to make prompts of; returns the model's name.

        Raises:
            ServerUnusable: no answer, or none that makes sense.
        """
        models = await self._get_json("/v1/models")
        try:
            self._model = str(models["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise ServerUnusable(self.url, "/v1/models lists no model") from error
        body = {"model": self._model, "prompt": " ".join(_WORDS.split()), "add_special_tokens": False}
        self._word_ids = list((await self._post_json("/tokenize", body))["tokens"])
        return self._model

    def prompt_ids(self, planned: PlannedRequest) -> list[int]:
        """Words in an order of their own for each request, so that prefix caches do not shorten the work."""
        return random.Random(planned.pick).choices(self._word_ids, k=planned.num_input_tokens)

    async def complete(self, planned: PlannedRequest, *, due_s: float) -> RequestRecord:
        """Send one request and read its stream to the end. Never raises for what the server does: see `error`."""
        record = RequestRecord(planned, due_s=due_s)
        body = {
            "model": self._model,
            "prompt": self.prompt_ids(planned),
            "max_tokens": planned.num_output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        raw = json.dumps(body).encode()
        record.sent_s = time.monotonic()
        try:
            async with self._places:
                await self._stream(raw, record)
        except TimeoutError:
            record.error = "timeout"
        except (aiohttp.ClientError, ConnectionError) as error:
            record.error = type(error).__name__
        record.end_s = time.monotonic()
        return record

    async def _stream(self, raw: bytes, record: RequestRecord) -> None:
        async with self._session.post(
            f"{self.url}/v1/completions",
            data=raw,
            headers={"Content-Type": "application/json"},
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
        ) as response:
            if response.status == 200:
                await _read_stream(response, record)
            else:
                record.error = f"http_{response.status}"
                await response.read()

    async def fetch_phases(self, records: Sequence[RequestRecord]) -> None:
        """Ask the server for its own stamps of finished requests. A server without that route has none.

        Workers write theirs a moment after the last token, off the way of other tokens.
        """
        await asyncio.sleep(STAMPS_AFTER_S)
        for record in records:
            if record.error or not record.request_id:
                continue
            try:
                answer = await self._get_json(f"/v1/requests/{record.request_id}")
            except ServerUnusable:
                return
            timings = answer.get("timings_ms") or {}
            record.phases_ms = {name: float(value) for name, value in timings.items() if value is not None}

    async def _get_json(self, path: str) -> dict[str, Any]:
        return await self._json("GET", path, None)

    async def _post_json(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return await self._json("POST", path, body)

    async def _json(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        try:
            timeout = aiohttp.ClientTimeout(total=30)
            async with self._session.request(method, self.url + path, json=body, timeout=timeout) as response:
                if response.status != 200:
                    raise ServerUnusable(self.url, f"{method} {path} answered {response.status}")
                answer: dict[str, Any] = await response.json()
                return answer
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ServerUnusable(self.url, f"{method} {path} failed ({error or type(error).__name__})") from error


async def _read_stream(response: aiohttp.ClientResponse, record: RequestRecord) -> None:
    is_done = False
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        payload = line[5:].strip()
        if payload == b"[DONE]":
            is_done = True
            continue
        _take_event(json.loads(payload), record, time.monotonic())
    if not record.error and not is_done:
        record.error = "cut_stream"
    if not record.error and not record.token_stamps_s:
        record.error = "no_tokens"


def _take_event(event: dict[str, Any], record: RequestRecord, now_s: float) -> None:
    if error := event.get("error"):
        record.error = str(error.get("code") or error.get("type") or "error")
        return
    record.request_id = record.request_id or str(event.get("id", ""))
    if any(choice.get("text") or choice.get("token_ids") for choice in event.get("choices", [])):
        record.token_stamps_s.append(now_s)
    if usage := event.get("usage"):
        record.num_prompt_tokens = int(usage.get("prompt_tokens", 0))
        record.num_output_tokens = int(usage.get("completion_tokens", 0))
