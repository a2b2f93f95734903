"""The same load on two clusters of one machine: `both` workers against prefill + decode workers.

    round 1   both          disaggregated
    round 2   disaggregated both             the order alternates, so that a drift of the machine favours neither
    ...

Both clusters are up the whole time; only one has load. Each round has a seed of its own, the same on both sides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.cluster import Cluster
from benchmarks.load import LoadSpec
from benchmarks.serve import Run, Slo, run_load, summarize_run
from benchmarks.stats import Ratio, paired_ratio

_MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "ttft_p50": lambda row: float(row["ttft_ms"]["p50"]),
    "ttft_p99": lambda row: float(row["ttft_ms"]["p99"]),
    "itl_p99": lambda row: float(row["itl_ms"]["p99"]),
    "tpot_p50": lambda row: float(row["tpot_ms"]["p50"]),
    "e2e_p50": lambda row: float(row["e2e_ms"]["p50"]),
    "output_tokens_per_s": lambda row: float(row["output_tokens_per_s"]),
    "goodput_rps": lambda row: float(row["goodput_rps"]),
}


def compare(
    both: Cluster,
    disaggregated: Cluster,
    spec: LoadSpec,
    *,
    num_rounds: int,
    slo: Slo,
    on_round: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], dict[str, Ratio]]:
    """Two rows (all rounds of a side together) and the ratios disaggregated / both with their intervals.

    A round in which either side's generator was late is left out of the ratios.
    """
    runs: dict[str, list[Run]] = {"both": [], "disaggregated": []}
    sides = [("both", both), ("disaggregated", disaggregated)]
    for cluster in (both, disaggregated):  # first use of each shape costs more; it is not measured
        asyncio.run(run_load(cluster.url, replace(spec, num_requests=2, duration_s=None, seed=-1)))
    for k in range(num_rounds):
        for name, cluster in sides if k % 2 == 0 else sides[::-1]:
            runs[name].append(asyncio.run(run_load(cluster.url, replace(spec, seed=spec.seed + k))))
            on_round()
    rows = {name: [_row(run, "", spec, slo) for run in side] for name, side in runs.items()}
    valid = [k for k in range(num_rounds) if not rows["both"][k]["is_void"] and not rows["disaggregated"][k]["is_void"]]
    ratios = {
        name: paired_ratio(
            [measure(rows["disaggregated"][k]) for k in valid], [measure(rows["both"][k]) for k in valid]
        )
        for name, measure in _MEASURES.items()
    }
    totals = [
        _row(_joined(runs["both"]), both.layout, spec, slo),
        _row(_joined(runs["disaggregated"]), disaggregated.layout, spec, slo),
    ]
    return [{**total, "num_rounds": num_rounds, "num_valid_rounds": len(valid)} for total in totals], ratios


def _row(run: Run, layout: str, spec: LoadSpec, slo: Slo) -> dict[str, Any]:
    return summarize_run(run, layout=layout, rate_rps=spec.rate_rps, slo=slo)


def _joined(runs: Sequence[Run]) -> Run:
    return Run([record for run in runs for record in run.records], sum(run.duration_s for run in runs), runs[0].model)
