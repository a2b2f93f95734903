"""The gateway's metrics, in a registry of their own. A process exports only what it owns.

Times are seconds on the wire (Prometheus base units) and ms in code where a name says so. Labels come from short fixed
lists, never from what a client sends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvstore.errors import KVStoreError
from kvstore.state.phases import PHASES, closure_ms, phases_ms
from kvstore.state.records import Record, WorkerBeat

BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TIMES: Final = {
    **PHASES,
    "handoff": "First token sampled until the first decode step begins: transfer and decode_wait",
    "ttft": "Arrival until the first token event",
    "itl": "Gap between two token events of a choice",
    "e2e": "Arrival until the end",
}


class Registry(Protocol):
    def workers(self) -> list[WorkerBeat]: ...
    def count_by_state(self) -> dict[str, int]: ...


class GatewayMetrics:
    """All metrics of one gateway process. Thread-safe."""

    def __init__(self, store: Registry) -> None:
        self.registry = CollectorRegistry()
        self.answers = Counter(
            "celeriac_http_answers", "Answers by endpoint and status", ["endpoint", "status"], registry=self.registry
        )
        self.ended = Counter("celeriac_requests", "Requests that ended, by state", ["state"], registry=self.registry)
        self.open_calls = Gauge("celeriac_open_calls", "API calls in work", registry=self.registry)
        self.refused = Counter("celeriac_refused", "Calls refused early", ["reason"], registry=self.registry)
        self.prompt_tokens = Counter("celeriac_prompt_tokens", "Prompt tokens accepted", registry=self.registry)
        self.output_tokens = Counter("celeriac_output_tokens", "Output tokens delivered", registry=self.registry)
        self._times = {
            name: Histogram(f"celeriac_{name}_seconds", help_text, buckets=BUCKETS_S, registry=self.registry)
            for name, help_text in TIMES.items()
        }
        self.registry.register(_WorkerCollector(store))

    def observe(self, name: str, seconds: float) -> None:
        """One observation of a name of `TIMES`."""
        self._times[name].observe(max(0.0, seconds))

    def observe_record(self, record: Record) -> None:
        """The phases that a finished record shows."""
        for name, duration_ms in record_timings_ms(record).items():
            if name in PHASES or name == "handoff":
                self.observe(name, duration_ms / 1000)

    def text(self) -> bytes:
        """The exposition of this moment."""
        return generate_latest(self.registry)


def record_timings_ms(record: Record) -> dict[str, float]:
    """What a record tells of its times: the phases that are over, sums of them, and `closure` (kvstore.state.phases).

    `handoff` is transfer + decode_wait; `ttft` and `total` run from the acceptance, on the state server's clock.
    """
    stamps = record.stamps
    timings = phases_ms(stamps, record.prefill_spans, record.decode_spans)
    if "transfer" in timings and "decode_wait" in timings:
        timings["handoff"] = timings["transfer"] + timings["decode_wait"]
    for name, end in (("ttft", "first_token"), ("total", "finished")):
        if "queued" in stamps and end in stamps:
            timings[name] = stamps[end] - stamps["queued"]
    closure = closure_ms(stamps, record.prefill_spans, record.decode_spans)
    return timings if closure is None else {**timings, "closure": closure}


class _WorkerCollector:
    """What the workers' last beats say, read at each scrape; nothing while the state server is away."""

    def __init__(self, store: Registry) -> None:
        self._store = store

    def describe(self) -> Iterator[Metric]:
        yield from ()  # registering must not ask the state server

    def collect(self) -> Iterator[Metric]:
        try:
            beats, states = self._store.workers(), self._store.count_by_state()
        except KVStoreError:
            return
        yield _states(states)
        blocks = GaugeMetricFamily("celeriac_kv_blocks", "KV blocks by state", labels=["node", "state"])
        workers = GaugeMetricFamily("celeriac_worker_up", "Live workers", labels=["node", "role", "model"])
        live = GaugeMetricFamily("celeriac_live_sequences", "Sequences held by a worker", labels=["node"])
        step = GaugeMetricFamily("celeriac_step_seconds", "Recent step time of a worker", labels=["node"])
        overdue = GaugeMetricFamily(
            "celeriac_kv_overdue_writers", "Writers that leave a fence of this worker unanswered", labels=["node"]
        )
        counters = CounterMetricFamily("celeriac_worker_events", "Counters of a worker", labels=["node", "event"])
        for beat in beats:
            for state, count in beat.blocks.items():
                blocks.add_metric([beat.node, state], count)
            workers.add_metric([beat.node, beat.role, beat.model], 1)
            live.add_metric([beat.node], beat.live)
            step.add_metric([beat.node], beat.step_ms / 1000)
            overdue.add_metric([beat.node], len(beat.overdue_writers))
            for name, value in beat.counters.items():
                counters.add_metric([beat.node, name], value)
        yield from (blocks, workers, live, step, overdue, counters)


def _states(states: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily("celeriac_requests_by_state", "Requests that have not ended", labels=["state"])
    for state, count in states.items():
        family.add_metric([state.lower()], count)
    return family
