"""One engine without Celery, Redis and HTTP: the baseline of `celeriac bench engine`.

    python -m engines.solo --concurrency 64 --num-requests 256 --input-len 64 --output-len 64 --cpus 1
    python -m engines.solo --cpus 1 --jobs        one job per line of standard input, see `Job`

The engine process is the one that workers start; this program only feeds it over its socket, closed loop. It
prints one JSON line when the engine is ready (with `--jobs`) and one per job. Steps go to $CELERIAC_STEP_LOG.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import click
import msgspec

from configs.loader import load_with_origins
from engines.messages import Add, FrameReader, Lease, Ready, Shutdown, Stats, Tokens, decode_engine, frame
from engines.params import SamplingParams
from engines.process import EngineChild, spawn_engine
from kvstore.readable import wait_readable

LEASE_EVERY_S = 0.5
READ_BYTES = 1 << 20
SWEEP_STEPS = 4  # a sweep changes the number of live requests by one every so many steps
PROMPT_IDS = range(3, 1000)  # in every vocabulary


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`num_requests` requests, at most `concurrency` at once.

    Attributes:
        min_concurrency: above 0, the number of live requests sweeps between it and `concurrency`, so that a step log
            has steps of every batch size between them.
        min_output_len: above 0, output lengths are uniform between it and `output_len`.
        wants_ids: the result has `token_ids` too: a list for each request, in their order.
        wants_counters: it also has `counters`, totals of the engine since it started.
        params: how tokens are chosen; lengths are as above, and no request ends before.
        prompts: these, one after another and from the first again, instead of `input_len` random ids.
    """

    num_requests: int
    concurrency: int
    input_len: int
    output_len: int
    min_concurrency: int = 0
    min_output_len: int = 0
    seed: int = 0
    wants_ids: bool = False
    wants_counters: bool = False
    params: SamplingParams = SamplingParams(temperature=0.0)
    prompts: list[list[int]] = []

    def concurrency_at(self, num_steps: int) -> int:
        """Requests that may be live after `num_steps` steps.

        >>> job = Job(num_requests=9, concurrency=3, input_len=1, output_len=1, min_concurrency=1)
        >>> [job.concurrency_at(k * SWEEP_STEPS) for k in range(6)]
        [3, 2, 1, 2, 3, 2]
        """
        span = self.concurrency - (self.min_concurrency or self.concurrency)
        if span <= 0:
            return self.concurrency
        return self.concurrency - span + abs(num_steps // SWEEP_STEPS % (2 * span) - span)


class Feeder:
    """Talks to one engine. One thread."""

    def __init__(self, child: EngineChild, *, timeout_s: float) -> None:
        """`timeout_s`: for the engine to be ready, and for each job."""
        self._child = child
        self._timeout_s = timeout_s
        self._reader = FrameReader()
        self._numbers = itertools.count()
        self._num_live = 0
        self._num_steps = 0
        self._num_tokens = 0
        self._ids: dict[str, list[int]] = {}

    def wait_ready(self) -> Ready:
        """Block until the weights are loaded.

        Raises:
            TimeoutError, EOFError: the engine is not ready in time, or died.
        """
        end = time.monotonic() + self._timeout_s
        while time.monotonic() < end:
            for message in self._read(1.0):
                if isinstance(message, Ready):
                    return message
        raise TimeoutError(f"the engine is not ready after {self._timeout_s} s")

    def run(self, job: Job) -> dict[str, Any]:
        """`seconds` from the first request to the last token, and `num_tokens`, all of them.

        Raises:
            TimeoutError: the engine did not finish in time.
            EOFError: the engine died.
        """
        adds = list(self._adds(job))[::-1]
        self._num_steps = self._num_tokens = 0
        self._ids = {add.rid: [] for add in reversed(adds)}
        started_s, lease_s = time.monotonic(), 0.0
        while adds or self._num_live:
            now = time.monotonic()
            if now - started_s > self._timeout_s:
                raise TimeoutError(f"{self._num_live} requests are not done after {self._timeout_s} s")
            if now - lease_s > LEASE_EVERY_S:
                self._child.sock.sendall(frame(Lease()))
                lease_s = now
            num_free = max(0, job.concurrency_at(self._num_steps) - self._num_live)
            # In one write: the engine sees a batch as a batch.
            batch = [adds.pop() for _ in range(min(num_free, len(adds)))]
            if batch:
                self._child.sock.sendall(b"".join(map(frame, batch)))
                self._num_live += len(batch)
            self._read(LEASE_EVERY_S)
        result: dict[str, Any] = {"seconds": time.monotonic() - started_s, "num_tokens": self._num_tokens}
        if job.wants_ids:
            result["token_ids"] = list(self._ids.values())
        if job.wants_counters:
            result["counters"] = self._next_counters()
        return result

    def _next_counters(self) -> dict[str, float]:
        """Of the next statistics that the engine sends; they come twice a second."""
        end = time.monotonic() + self._timeout_s
        while time.monotonic() < end:
            for message in self._read(LEASE_EVERY_S):
                if isinstance(message, Stats):
                    return message.counters
        raise TimeoutError(f"the engine sent no statistics within {self._timeout_s} s")

    def _adds(self, job: Job) -> Iterator[Add]:
        rng = random.Random(job.seed)
        for i in range(job.num_requests):
            number = next(self._numbers)
            num_output = rng.randint(job.min_output_len or job.output_len, job.output_len)
            random_ids = rng.choices(PROMPT_IDS, k=job.input_len)
            yield Add(
                rid=f"solo{number}",
                epoch=1,
                token="solo",
                mode="local",
                prompt_ids=job.prompts[i % len(job.prompts)] if job.prompts else random_ids,
                choices=[[]],
                params=msgspec.structs.replace(job.params, max_tokens=num_output, ignore_eos=True),
                seed=number,
            )

    def _read(self, wait_s: float) -> list[object]:
        if not wait_readable([self._child.sock], wait_s):
            return []
        chunk = self._child.sock.recv(READ_BYTES)
        if not chunk:
            raise EOFError("the engine process ended; its reason is above")
        messages: list[object] = [decode_engine(body) for body in self._reader.feed(chunk)]
        for message in messages:
            if isinstance(message, Tokens):
                self._num_steps += 1
                self._num_tokens += sum(len(out.token_ids) for out in message.outs)
                self._num_live -= sum(bool(out.finish) for out in message.outs)
                for out in message.outs:
                    self._ids[out.rid] += out.token_ids
        return messages


@click.command()
@click.option("--concurrency", default=64, show_default=True)
@click.option("--num-requests", default=256, show_default=True)
@click.option("--input-len", default=64, show_default=True, help="Prompt tokens.")
@click.option("--output-len", default=64, show_default=True)
@click.option("--jobs", is_flag=True, help="Read jobs from standard input, one JSON object per line.")
@click.option("--cpus", default="", help="Core numbers with commas; empty: all.")
@click.option("--seed", default=0, show_default=True)
@click.option("--timeout-s", default=300.0, show_default=True)
def main(
    concurrency: int,
    num_requests: int,
    input_len: int,
    output_len: int,
    jobs: bool,
    cpus: str,
    seed: int,
    timeout_s: float,
) -> None:
    """Feed one engine and print its totals."""
    job = Job(num_requests=num_requests, concurrency=concurrency, input_len=input_len, output_len=output_len, seed=seed)
    child = spawn_engine(
        load_with_origins(join_running=False).settings,  # a running cluster is none of this engine's business
        role="both",
        node="solo",
        incarnation="solo",
        secret=b"nobody connects to this engine",
        cpus=tuple(int(cpu) for cpu in cpus.split(",") if cpu),
    )
    try:
        feeder = Feeder(child, timeout_s=timeout_s)
        ready = feeder.wait_ready()
        if jobs:
            facts = {"pid": ready.pid, "dtype": ready.dtype, "num_threads": ready.num_threads, "load_s": ready.load_s}
            print(json.dumps(facts), flush=True)
        for each in (msgspec.json.decode(line, type=Job) for line in sys.stdin) if jobs else [job]:
            print(json.dumps(feeder.run(each)), flush=True)
        child.sock.sendall(frame(Shutdown()))
        child.wait(10)
    finally:
        child.kill()


if __name__ == "__main__":
    main()
