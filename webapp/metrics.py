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
from kvstore.state.records import WorkerBeat

BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# Phase: stamps of the record between which it lies.
PHASES: Final = {
    "queue": ("queued", "claimed"),
    "prefill": ("prefill_start", "prefill_end"),
    "transfer": ("prefill_end", "transferred"),
    "decode_wait": ("transferred", "handed"),
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
        self._phases = {
            name: Histogram(f"celeriac_{name}_seconds", help_text, buckets=BUCKETS_S, registry=self.registry)
            for name, help_text in (
                ("queue", "Accepted until claimed"),
                ("prefill", "Prefill computation"),
                ("transfer", "Prefill done until its KV has arrived"),
                ("decode_wait", "KV arrived until the decode worker owns the request"),
                ("ttft", "Arrival until the first token event"),
                ("itl", "Gap between two token events of a choice"),
                ("e2e", "Arrival until the end"),
            )
        }
        self.registry.register(_WorkerCollector(store))

    def observe(self, phase: str, seconds: float) -> None:
        """One observation of `queue`, `prefill`, `transfer`, `decode_wait`, `ttft`, `itl` or `e2e`."""
        self._phases[phase].observe(max(0.0, seconds))

    def observe_stamps(self, stamps_ms: Mapping[str, int]) -> None:
        """The phases that a finished record shows."""
        for phase, duration_ms in phase_durations_ms(stamps_ms).items():
            self.observe(phase, duration_ms / 1000)

    def text(self) -> bytes:
        """The exposition of this moment."""
        return generate_latest(self.registry)


def phase_durations_ms(stamps_ms: Mapping[str, int]) -> dict[str, int]:
    """Durations of the phases whose two stamps are there."""
    return {
        phase: max(0, stamps_ms[end] - stamps_ms[start])
        for phase, (start, end) in PHASES.items()
        if start in stamps_ms and end in stamps_ms
    }


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
