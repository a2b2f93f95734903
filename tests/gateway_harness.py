"""A live gateway for tests, and a publisher that plays the workers by the real functions of the state server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import msgspec
import redis

from configs.schema import GatewaySettings, ModelSettings, Settings, StateSettings
from engines.params import SamplingParams
from engines.tokenizer import TextStream, Tokenizer
from kvstore.address import KVAddress
from kvstore.errors import StateUnavailable
from kvstore.state import StateStore
from kvstore.state.entries import FinEntry, TokenEntry, TokenLogprobs
from kvstore.state.hashing import hash_of, roll
from kvstore.state.records import AppendItem, WorkerBeat
from kvstore.state.replies import Claimed, Dup, HandedOff, Ok

ROOT = Path(__file__).resolve().parent.parent
TINY_CHAT = ROOT / "models" / "tiny-chat"
SECRET = "a secret of at least thirty-two bytes"
_SERVE = """
import sys, msgspec
from configs.schema import Settings
from webapp.server import run_gateway
run_gateway(msgspec.json.decode(sys.argv[1], type=Settings))
"""
_encode = msgspec.msgpack.Encoder().encode
_params = msgspec.msgpack.Decoder(SamplingParams).decode


def settings_for(redis_url: str, *, port: int = 0, **gateway: Any) -> Settings:
    """Settings of a gateway on `redis_url` (broker and state on one database) with the bundled model."""
    return Settings(
        model=ModelSettings(path=str(TINY_CHAT)),
        state=StateSettings(broker_url=redis_url, state_url=redis_url),
        gateway=GatewaySettings(port=port, threads=gateway.pop("threads", 40), **gateway),
    )


class LiveGateway:
    """A gunicorn of its own process on a free port of the loopback."""

    def __init__(self, redis_url: str, **gateway: Any) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        settings = settings_for(redis_url, port=self.port, **gateway)
        env = {**os.environ, "CELERIAC_CLUSTER_SECRET": SECRET, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _SERVE, msgspec.json.encode(settings).decode()]
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        wait_until(self._answers, timeout_s=60, what="the gateway answers /health", log=self.log)

    def stop(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError("the gateway left:\n" + "".join(self.log))
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)


class Publisher:
    """Plays prefill and decode worker: claims what is queued, hands off to itself, publishes `reply_ids`.

    Attributes:
        step_s: pause between two tokens.
        hold_at: publish no further than this many tokens, until it is set higher.
    """

    def __init__(self, redis_url: str, tokenizer: Tokenizer, reply: str) -> None:
        self.store = StateStore(redis_url)
        self.tokenizer = tokenizer
        self.reply_ids = [*tokenizer.encode(reply), tokenizer.eos_token_ids[0]]
        self.step_s = 0.0
        self.hold_at = 1 << 30
        self.has_workers = True
        self.num_claims = 0
        self._redis: redis.Redis = redis.Redis.from_url(redis_url, protocol=2)
        self._stopped = threading.Event()
        self._counter = 0
        self._threads: list[threading.Thread] = []
        self._main = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._beat()
        self._main.start()

    def stop(self) -> None:
        self._stopped.set()
        self._main.join(5)
        for thread in self._threads:
            thread.join(5)
        self.store.close()
        self._redis.close()

    def _run(self) -> None:
        beat_s = 0.0
        while not self._stopped.wait(0.01):
            try:
                beat_s = self._look(beat_s)
            except (StateUnavailable, redis.RedisError):
                time.sleep(0.05)

    def _look(self, beat_s: float) -> float:
        if time.monotonic() - beat_s > 0.5:
            self._beat()
            beat_s = time.monotonic()
        for rid in self._redis.zrange("cel:{s00}:live", 0, -1):
            record = self.store.record(rid.decode())
            if record is not None and record.state == "QUEUED":
                self._serve(rid.decode())
        return beat_s

    def _serve(self, rid: str) -> None:
        self._counter += 1
        claimed = self.store.claim(rid, f"pub-1.{self._counter}")
        if not isinstance(claimed, Claimed):
            return
        self.num_claims += 1
        self._counter += 1
        token = f"pub-1.{self._counter}"
        handed = self.store.handoff(rid, claimed.epoch, f"pub-1.{self._counter - 1}", token)
        assert isinstance(handed, HandedOff)
        thread = threading.Thread(target=self._publish, args=(rid, handed.epoch, token, claimed), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _publish(self, rid: str, epoch: int, token: str, claimed: Claimed) -> None:
        params = _params(claimed.body.params)
        choices = [_Choice(self.tokenizer, params, self.reply_ids[:n]) for n in claimed.n]
        for position, token_id in enumerate(self.reply_ids[: params.max_tokens]):
            while not self._stopped.is_set() and position >= self.hold_at:
                time.sleep(0.01)
            for c, choice in enumerate(choices):
                if choice.is_open and position == choice.n:
                    entry, fin, new_hash = choice.push(token_id)
                    item = AppendItem(
                        rid, epoch, token, "DECODING", c, entry.index, entry.prefix_hash, new_hash, 1, _encode(entry),
                        None if fin is None else _encode(fin),
                    )  # fmt: skip
                    if not self._append(item):
                        return
            if self.step_s:
                time.sleep(self.step_s)

    def _append(self, item: AppendItem) -> bool:
        while not self._stopped.is_set():
            try:
                return isinstance(self.store.append_batch([item])[0], Ok | Dup)
            except StateUnavailable:
                time.sleep(0.05)
        return False

    def _beat(self) -> None:
        if self.has_workers:
            for role in ("prefill", "decode"):
                address = KVAddress(incarnation=f"{role}-1", host_id="here")
                blocks = {"free": 90, "used": 10}
                self.store.heartbeat(
                    WorkerBeat(
                        incarnation=f"{role}-1",
                        node=f"{role[0]}0@here",
                        role=role,
                        model="tiny-chat",
                        address=address,
                        dtype="float32",
                        repeatability="exact",
                        blocks=blocks,
                    )
                )


class _Choice:
    """One choice as a worker sees it, behind the ids that its log had at the claim."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, ids: list[int]) -> None:
        self.is_open = True
        self.n = len(ids)
        self._hash = hash_of(ids)
        self._params = params
        self._eos = () if params.ignore_eos else tokenizer.eos_token_ids
        self._text = TextStream(tokenizer, params)
        for token_id in ids:
            self._text.push(token_id)

    def push(self, token_id: int) -> tuple[TokenEntry, FinEntry | None, int]:
        """The next entry, the end if it brings one, and the hash behind it."""
        text = self._text.push(token_id)
        top = tuple((token_id + j, -0.25 - j) for j in range(self._params.logprobs or 0))
        logprobs = None if self._params.logprobs is None else (TokenLogprobs(-0.25, top),)
        entry = TokenEntry(self.n, self._hash, (token_id,), (text,), logprobs)
        self._hash = roll(self._hash, token_id)
        self.n += 1
        fin = None
        if self._text.matched_stop is not None:
            fin = FinEntry("FINISHED", "stop", self._text.matched_stop)
        elif token_id in self._eos or self.n == self._params.max_tokens:
            reason = "stop" if token_id in self._eos else "length"
            fin = FinEntry("FINISHED", reason, "", self._text.finish(reason), 3)
        self.is_open = fin is None
        return entry, fin, self._hash


def wait_until(claim: Callable[[], object], *, timeout_s: float, what: str, log: list[str] | None = None) -> None:
    """Poll `claim` until it holds; at most `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}\n{''.join(log or [])}"
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
