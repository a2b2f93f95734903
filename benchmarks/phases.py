"""What a server tells of the phases of its requests, summed up: do they close, and what does a hand-off cost? Pure.

`GET /v1/requests/{id}` gives `timings_ms`. Its phases follow each other from the acceptance to the end; `total` is that
whole time by another clock, so the difference of the two is how far the stamps are off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from benchmarks.stats import summarize

PHASES: Final = ("queue", "reserve", "prefill", "transfer", "decode_wait", "first_step", "decode")
HANDOFF_GOAL_MS: Final = 10.0
CLOSURE_GOAL_MS: Final = 1.0
Timings = Mapping[str, float]


def off_ms(timings: Timings) -> float | None:
    """How far the sum of the phases is from `total`; None unless the request has all of them and one stay."""
    if "closure" not in timings or "total" not in timings or any(name not in timings for name in PHASES):
        return None
    return abs(sum(timings[name] for name in PHASES) - timings["total"])


def handoff_minus_transfer_ms(timings: Timings) -> float | None:
    """First token sampled until the first decode step begins, without the way of the KV; None without a hand-off."""
    if "handoff" not in timings or "transfer" not in timings:
        return None
    return timings["handoff"] - timings["transfer"]


def summarize_phases(all_timings: Sequence[Timings]) -> dict[str, Any]:
    """Parts of a row: `phases_ms`, and for requests that were handed over `handoff_minus_transfer_ms`, `closure_ms`."""
    others = sorted({name for timings in all_timings for name in timings} - {*PHASES, "closure"})
    names = [name for name in (*PHASES, *others) if any(name in timings for timings in all_timings)]
    overheads = [ms for timings in all_timings if (ms := handoff_minus_transfer_ms(timings)) is not None]
    offs = [ms for timings in all_timings if (ms := off_ms(timings)) is not None]
    row: dict[str, Any] = {
        "phases_ms": {n: asdict(summarize([timings[n] for timings in all_timings if n in timings])) for n in names}
    }
    if overheads:
        row["handoff_minus_transfer_ms"] = {**asdict(summarize(overheads)), "goal_p50": HANDOFF_GOAL_MS}
    if offs:
        row["closure_ms"] = {**asdict(summarize(offs)), "max": max(offs), "goal_max": CLOSURE_GOAL_MS}
    return row


def phase_lines(row: Mapping[str, Any]) -> list[str]:
    """What the row says of the hand-off and of its own stamps, for people."""
    lines = []
    if handoff := row.get("handoff_minus_transfer_ms"):
        lines.append(
            f"hand-off minus transfer: p50 {handoff['p50']:.2f}, p90 {handoff['p90']:.2f}, p99 {handoff['p99']:.2f} ms "
            f"over {handoff['num']} hand-offs; goal p50 <= {handoff['goal_p50']:g} ms: "
            f"{_verdict(handoff['p50'], handoff['goal_p50'])}"
        )
    if closure := row.get("closure_ms"):
        lines.append(
            f"the phases of a request miss its total by p50 {closure['p50']:.3f}, p99 {closure['p99']:.3f}, at most "
            f"{closure['max']:.3f} ms; goal <= {closure['goal_max']:g} ms: "
            f"{_verdict(closure['max'], closure['goal_max'])}"
        )
    return lines


def _verdict(value: float, goal: float) -> str:
    return "reached" if value <= goal else "missed"
