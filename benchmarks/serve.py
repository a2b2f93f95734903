"""Runs a planned load against a server and sums it up as one row."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp

from benchmarks.client import Client, RequestRecord
from benchmarks.load import LoadSpec, Pacer, plan_load
from benchmarks.phases import summarize_phases
from benchmarks.stats import summarize

MAX_LAG_MS = 5.0


@dataclass(frozen=True)
class Slo:
    """Latency targets; infinite where there is none."""

    ttft_ms: float = float("inf")
    tpot_ms: float = float("inf")

    def is_met(self, record: RequestRecord) -> bool:
        return not record.error and record.ttft_ms <= self.ttft_ms and (record.tpot_ms or 0.0) <= self.tpot_ms


@dataclass
class Run:
    """One run. `duration_s`: from its start to the last end."""

    records: list[RequestRecord]
    duration_s: float
    model: str


async def run_load(
    url: str, spec: LoadSpec, *, concurrency_limit: int = 0, on_done: Callable[[], None] = lambda: None
) -> Run:
    """Send the load and wait for every answer.

    Args:
        concurrency_limit: requests in flight at most; 0 is no limit. With a limit the loop is no longer open: requests
            wait in the client, and that wait counts into their latency.
        on_done: called after each request.

    Raises:
        ServerUnusable: the server does not answer the preparing calls.
    """
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        client = Client(url, session, concurrency_limit=concurrency_limit)
        model = await client.prepare()
        start_s = time.monotonic()
        pacer = Pacer(plan_load(spec), time.monotonic)
        tasks: list[asyncio.Task[RequestRecord]] = []
        while (wait_s := pacer.wait_s()) is not None:
            # A timer may fire a millisecond late; spinning would be punctual and starve the readers. Lag is reported.
            await asyncio.sleep(wait_s)
            for planned in pacer.take_due():
                task = asyncio.create_task(client.complete(planned, due_s=pacer.due_s(planned)))
                task.add_done_callback(lambda _: on_done())
                tasks.append(task)
        records = list(await asyncio.gather(*tasks))
        duration_s = time.monotonic() - start_s
        await client.fetch_phases(records)
    return Run(records, duration_s, model)


def summarize_run(run: Run, *, layout: str, rate_rps: float, slo: Slo) -> dict[str, Any]:
    """One row of JSON values: latencies over the requests that ended properly, rates over the whole run."""
    good = [record for record in run.records if not record.error]
    met = [record for record in good if slo.is_met(record)]
    lag = summarize([record.lag_ms for record in run.records])
    num_output_tokens = sum(record.num_output_tokens for record in good)
    return {
        "layout": layout,
        "model": run.model,
        "rate_rps": rate_rps,
        "num_requests": len(run.records),
        "num_ok": len(good),
        "errors": dict(Counter(record.error for record in run.records if record.error)),
        "duration_s": run.duration_s,
        "requests_per_s": len(good) / run.duration_s,
        "output_tokens_per_s": num_output_tokens / run.duration_s,
        "prompt_tokens_per_s": sum(record.num_prompt_tokens for record in good) / run.duration_s,
        "ttft_ms": asdict(summarize([record.ttft_ms for record in good])),
        "itl_ms": asdict(summarize([gap for record in good for gap in record.itl_ms])),
        "tpot_ms": asdict(summarize([record.tpot_ms for record in good if record.tpot_ms is not None])),
        "e2e_ms": asdict(summarize([record.e2e_ms for record in good])),
        "slo": {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms},
        "slo_attainment": len(met) / len(run.records) if run.records else 0.0,
        "goodput_rps": len(met) / run.duration_s,
        "lag_ms": asdict(lag),
        "is_void": lag.p99 > MAX_LAG_MS,
        **summarize_phases([record.phases_ms for record in good]),
    }
