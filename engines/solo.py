"""One engine without Celery, Redis and HTTP: the baseline of `celeriac bench engine --isolation`.

    python -m engines.solo --concurrency 64 --num-requests 256 --input-len 64 --output-len 64 --cpus 1

The engine process is the one that workers start; this program only feeds it over its socket, always `concurrency`
requests at once, greedy, and prints one JSON line of totals. Steps go to $CELERIAC_STEP_LOG.
"""

from __future__ import annotations

import json
import random
import select
import time

import click

import configs
from engines.messages import Add, FrameReader, Lease, Ready, Shutdown, Tokens, decode_engine, frame
from engines.params import SamplingParams
from engines.process import EngineChild, spawn_engine

LEASE_EVERY_S = 0.5
READ_BYTES = 1 << 20


class Feeder:
    """Keeps `concurrency` requests in the engine until all are done."""

    def __init__(self, child: EngineChild, adds: list[Add], *, concurrency: int) -> None:
        self._child = child
        self._waiting = adds[::-1]
        self._num_live = 0
        self._concurrency = concurrency
        self._reader = FrameReader()
        self.num_tokens = 0

    def run(self, timeout_s: float) -> float:
        """Seconds from the first request to the last token.

        Raises:
            TimeoutError: the engine did not finish within `timeout_s`.
            EOFError: the engine died.
        """
        self._until_ready(timeout_s)
        started_s, lease_s = time.monotonic(), 0.0
        while self._waiting or self._num_live:
            now = time.monotonic()
            if now - started_s > timeout_s:
                raise TimeoutError(f"{self._num_live} requests are not done after {timeout_s} s")
            if now - lease_s > LEASE_EVERY_S:
                self._child.sock.sendall(frame(Lease()))
                lease_s = now
            while self._waiting and self._num_live < self._concurrency:
                self._child.sock.sendall(frame(self._waiting.pop()))
                self._num_live += 1
            self._read(LEASE_EVERY_S)
        return time.monotonic() - started_s

    def _until_ready(self, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if any(isinstance(message, Ready) for message in self._read(1.0)):
                return
        raise TimeoutError(f"the engine is not ready after {timeout_s} s")

    def _read(self, wait_s: float) -> list[object]:
        if not select.select([self._child.sock], [], [], wait_s)[0]:
            return []
        chunk = self._child.sock.recv(READ_BYTES)
        if not chunk:
            raise EOFError("the engine process ended; its reason is above")
        messages: list[object] = [decode_engine(body) for body in self._reader.feed(chunk)]
        for message in messages:
            if isinstance(message, Tokens):
                self.num_tokens += sum(len(out.token_ids) for out in message.outs)
                self._num_live -= sum(bool(out.finish) for out in message.outs)
        return messages


@click.command()
@click.option("--concurrency", default=64, show_default=True)
@click.option("--num-requests", default=256, show_default=True)
@click.option("--input-len", default=64, show_default=True, help="Prompt tokens.")
@click.option("--output-len", default=64, show_default=True)
@click.option("--cpus", default="", help="Core numbers with commas; empty: all.")
@click.option("--seed", default=0, show_default=True)
@click.option("--timeout-s", default=300.0, show_default=True)
def main(
    concurrency: int, num_requests: int, input_len: int, output_len: int, cpus: str, seed: int, timeout_s: float
) -> None:
    """Feed one engine and print its totals."""
    rng = random.Random(seed)
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    adds = [
        Add(
            rid=f"solo{i}",
            epoch=1,
            token="solo",
            mode="local",
            prompt_ids=[rng.randrange(3, 1000) for _ in range(input_len)],
            choices=[[]],
            params=params,
            seed=i,
        )
        for i in range(num_requests)
    ]
    child = spawn_engine(
        configs.load(),
        role="both",
        node="solo",
        incarnation="solo",
        secret=b"nobody connects to this engine",
        cpus=tuple(int(cpu) for cpu in cpus.split(",") if cpu),
    )
    try:
        feeder = Feeder(child, adds, concurrency=concurrency)
        seconds = feeder.run(timeout_s)
        child.sock.sendall(frame(Shutdown()))
        child.wait(10)
    finally:
        child.kill()
    print(json.dumps({"seconds": seconds, "num_tokens": feeder.num_tokens}))


if __name__ == "__main__":
    main()
