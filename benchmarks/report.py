"""Results for people (a table, a plot) and for programs (one JSON object)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.phases import phase_lines
from benchmarks.serve import MAX_LAG_MS
from benchmarks.stats import MIN_ROUNDS, Ratio

_LATENCIES = {"TTFT": "ttft_ms", "ITL": "itl_ms", "TPOT": "tpot_ms", "E2E": "e2e_ms", "own lag": "lag_ms"}


def result_object(
    machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, Ratio]
) -> dict[str, Any]:
    """`{"machine": ..., "rows": [...], "ratios": {name: {value, low, high, goal, verdict}}}`."""
    return {
        "machine": dict(machine),
        "rows": [dict(row) for row in rows],
        "ratios": {name: {**asdict(ratio), "verdict": ratio.verdict} for name, ratio in ratios.items()},
    }


def to_json(result: Mapping[str, Any]) -> str:
    """JSON text; values that JSON has no number for (NaN, infinity) become null."""
    return json.dumps(_finite(result), indent=2, ensure_ascii=False)


def print_rows(console: Console, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """A table for each row, under one line about the machine."""
    features = " ".join(machine["cpu_features"])
    console.print(
        f"{machine['cpu']}, {machine['num_usable_cores']} of {machine['num_cores']} cores, "
        f"{machine['memory_gib']} GiB, {features}"
    )
    for row in rows:
        console.print(_latency_table(row))
        console.print(_rates_line(row))
        for line in phase_lines(row):
            console.print(line)
        if row["errors"]:
            console.print(f"errors: {', '.join(f'{code} x {num}' for code, num in row['errors'].items())}")
        if row["is_void"]:
            console.print(
                f"VOID: the load generator was late by {row['lag_ms']['p99']:.1f} ms at p99 (limit {MAX_LAG_MS:g}); "
                "give it a core of its own or lower the rate."
            )


def print_ratios(console: Console, ratios: Mapping[str, Ratio], *, num_rounds: int) -> None:
    """Ratios with their 95 % intervals, and what they say about their goals."""
    table = Table("ratio", "value", "95 % interval", "goal", "", title="prefill + decode, against both")
    for name, ratio in ratios.items():
        goal = "" if ratio.goal is None else f"{ratio.goal:g}"
        table.add_row(name, f"{ratio.value:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}", goal, ratio.verdict)
    console.print(table)
    if num_rounds < MIN_ROUNDS:
        console.print(f"Only {num_rounds} valid rounds: the intervals are too narrow. A claim needs {MIN_ROUNDS}.")


def plot_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bars of p50, p90 and p99 of each latency, one group per row. The file's suffix decides the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    latencies = {title: key for title, key in _LATENCIES.items() if key != "lag_ms"}
    figure, axes = pyplot.subplots(1, len(latencies), figsize=(3.2 * len(latencies), 3.6), layout="constrained")
    for axis, (title, key) in zip(axes, latencies.items(), strict=True):
        for k, row in enumerate(rows):
            heights = [row[key][q] if math.isfinite(row[key][q]) else 0.0 for q in ("p50", "p90", "p99")]
            places = [place + 0.8 * k / len(rows) for place in range(3)]
            axis.bar(places, heights, width=0.8 / len(rows), label=row["layout"])
        axis.set_title(f"{title}, ms")
        axis.set_xticks([place + 0.4 * (len(rows) - 1) / len(rows) for place in range(3)], ["p50", "p90", "p99"])
    axes[0].legend(fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)


def _latency_table(row: Mapping[str, Any]) -> Table:
    table = Table("ms", "p50", "p90", "p99", "mean", title=f"{row['layout']}, {row['model']}")
    for title, key in _LATENCIES.items():
        table.add_row(title, *(f"{row[key][q]:.1f}" for q in ("p50", "p90", "p99", "mean")))
    for name, phase in row["phases_ms"].items():
        table.add_row(f"  server: {name}", *(f"{phase[q]:.1f}" for q in ("p50", "p90", "p99", "mean")))
    return table


def _rates_line(row: Mapping[str, Any]) -> str:
    line = (
        f"{row['num_ok']} of {row['num_requests']} requests in {row['duration_s']:.1f} s at {row['rate_rps']:g}/s: "
        f"{row['requests_per_s']:.2f} requests/s, {row['output_tokens_per_s']:.1f} output tokens/s"
    )
    slo = row["slo"]
    if math.isfinite(slo["ttft_ms"]) or math.isfinite(slo["tpot_ms"]):
        line += (
            f"; goodput {row['goodput_rps']:.2f}/s ({100 * row['slo_attainment']:.0f} % within "
            f"TTFT {slo['ttft_ms']:g} ms, TPOT {slo['tpot_ms']:g} ms)"
        )
    return line


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
