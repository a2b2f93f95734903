"""docs/states.md and docs/metrics.md, made out of the tables and the collectors themselves."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.address import KVAddress
from kvstore.blocks import TRANSITIONS as GRANT_TRANSITIONS
from kvstore.state.records import WorkerBeat
from kvstore.state.transitions import FINAL_STATES, TRANSITIONS, RequestState
from webapp.metrics import GatewayMetrics


def states_page(made: Callable[[str], str]) -> str:
    """Both state machines that more than one process acts on, as diagrams and tables."""
    lines = [made("`kvstore/state/transitions.py` and `kvstore/blocks/grant_states.py`"), "# States", ""]
    lines += ["## A request", "", "The functions in the state server enforce this table; what is not in it is refused."]
    lines += ["", "```mermaid", "stateDiagram-v2", "    [*] --> QUEUED: accept"]
    for state, row in TRANSITIONS.items():
        by_next: dict[str, list[str]] = {}
        for event, following in row.items():
            by_next.setdefault(following.value, []).append(event.value)
        lines += [f"    {state.value} --> {name}: {', '.join(events)}" for name, events in by_next.items()]
    lines += [f"    {state.value} --> [*]" for state in RequestState if state in FINAL_STATES]
    lines += ["```", "", "| From | Event | To |", "|---|---|---|"]
    lines += [f"| {s.value} | {e.value} | {n.value} |" for s, row in TRANSITIONS.items() for e, n in row.items()]
    lines += ["", "## A grant of KV blocks, at the receiver", ""]
    lines += ["No timeout alone leads to FREE: only the writer's word or its proven death does.", ""]
    lines += ["| From | Event | To |", "|---|---|---|"]
    lines += [f"| {s.value} | {e.value} | {n.value} |" for s, row in GRANT_TRANSITIONS.items() for e, n in row.items()]
    return "\n".join(lines) + "\n"


class _OneWorker:
    """A registry with one worker, so that every metric of workers has a sample to be described by."""

    def workers(self) -> list[WorkerBeat]:
        address = KVAddress(incarnation="p0@host-1", host_id="host")
        return [
            WorkerBeat(
                incarnation="p0@host-1",
                node="p0@host",
                role="prefill",
                model="model",
                address=address,
                blocks={"free": 1},
                counters={"steps": 1.0},
            )
        ]

    def count_by_state(self) -> dict[str, int]:
        return {"QUEUED": 1}


def metrics_page(made: Callable[[str], str]) -> str:
    """Every metric of `/metrics`: name, kind, labels, meaning."""
    metrics = GatewayMetrics(_OneWorker())
    lines = [made("`webapp/metrics.py`"), "# Metrics", ""]
    lines += ["`GET /metrics` of a gateway, in the Prometheus text format. Times are in seconds.", ""]
    lines += ["| Metric | Kind | Labels | |", "|---|---|---|---|"]
    declared = {
        name: labels
        for collector, names in metrics.registry._collector_to_names.items()
        for name in names
        if (labels := getattr(collector, "_labelnames", ()))
    }
    for family in metrics.registry.collect():
        labels = sorted(declared.get(family.name, ()) or {k for s in family.samples for k in s.labels if k != "le"})
        name = family.name + ("_total" if family.type == "counter" else "")
        shown = ", ".join(f"`{label}`" for label in labels)
        lines.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    return "\n".join(lines) + "\n"
