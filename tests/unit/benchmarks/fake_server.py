"""A small OpenAI-like server on the loopback: every completion gets the same bytes."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

from aiohttp import web


def sse(*events: dict[str, Any] | str) -> str:
    return "".join(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events)


def chunk(text: str) -> dict[str, Any]:
    return {"id": "cmpl-1", "choices": [{"index": 0, "text": text}]}


def usage(num_tokens: int) -> dict[str, Any]:
    return {"id": "cmpl-1", "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": num_tokens}}


GOOD = sse(chunk("a"), chunk("b"), chunk("c"), usage(3), "[DONE]")
TIMINGS_MS = {
    "tokenize": 0.1, "queue": 1.5, "reserve": 1.0, "prefill": 2.5, "transfer": 2.0, "decode_wait": 4.0,
    "first_step": 3.0, "decode": 6.0, "handoff": 6.0, "total": 20.25, "ttft": 5.5, "closure": -0.25,
    "of_another_version": None,
}  # fmt: skip
METRICS = 'celeriac_worker_up{model="tiny",node="p0@host",role="prefill"} 1.0\n'


class FakeServer:
    """A context manager: its value is the address. Runs in a thread of its own.

    Completions are answered `crowd` at a time: each waits until so many are here.
    """

    def __init__(self, answer: str = GOOD, status: int = 200, *, crowd: int = 1) -> None:
        self._answer = answer
        self._status = status
        self._crowd = asyncio.Barrier(crowd)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake-server", daemon=True)
        self.bodies: list[dict[str, Any]] = []
        self.num_live = 0
        self.max_live = 0

    def __enter__(self) -> str:
        self._thread.start()
        return asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> str:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_get("/v1/requests/{id}", self._request)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.num_live += 1
        self.max_live = max(self.max_live, self.num_live)
        await self._crowd.wait()
        self.num_live -= 1
        return web.Response(text=self._answer, status=self._status, content_type="text/event-stream")

    async def _models(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"data": [{"id": "tiny"}]})

    async def _tokenize(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"tokens": list(range(10, 90))})

    async def _request(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"timings_ms": TIMINGS_MS})

    async def _metrics(self, _: web.Request) -> web.StreamResponse:
        return web.Response(text=METRICS)
