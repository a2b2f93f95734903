"""Results of `celeriac bench engine` for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.engine_profile import PARTS
from benchmarks.engine_steps import CONTEXT_BIN_TOKENS
from benchmarks.stats import MIN_ROUNDS, Ratio

MAX_BINS = 24  # shown; JSON has all


def print_machine(console: Console, machine: Mapping[str, Any]) -> None:
    console.print(
        f"{machine['cpu']}, {machine['num_usable_cores']} of {machine['num_cores']} cores, "
        f"{machine['memory_gib']} GiB, {' '.join(machine['cpu_features'])}"
    )


def print_isolation(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """The whole, and the bins that the comparison rests on most, in the order of batch sizes."""
    total, bins = rows[0], [row for row in rows if row["row"] == "bin"]
    console.print(total["layout"])
    console.print(
        f"{total['dtype']}, {total['num_rounds']} rounds, pure decode steps: {total['num_loaded_steps']} loaded, "
        f"{total['num_alone_steps']} alone, {total['num_compared_steps']} compared; "
        f"{total['num_failed_requests']} requests failed; p99 over p50 of a step: "
        f"{total['loaded_ms_p99_over_p50']:.2f} loaded, {total['alone_ms_p99_over_p50']:.2f} alone"
    )
    table = Table("batch", "context per seq", "steps loaded", "steps alone", "loaded, ms", "alone, ms", "ratio")
    heaviest = sorted(bins, key=lambda row: min(row["num_loaded"], row["num_alone"]), reverse=True)[:MAX_BINS]
    for row in sorted(heaviest, key=lambda row: (row["num_seqs"], row["context_bin"])):
        low = CONTEXT_BIN_TOKENS * row["context_bin"]
        table.add_row(
            *(
                str(row["num_seqs"]),
                f"{low} to {low + CONTEXT_BIN_TOKENS - 1}",
                str(row["num_loaded"]),
                str(row["num_alone"]),
            ),
            *(f"{row['loaded_ms']:.2f}", f"{row['alone_ms']:.2f}", f"{row['ratio']:.3f}"),
        )
    console.print(table)
    if len(bins) > MAX_BINS:
        console.print(f"The {MAX_BINS} bins with the most steps, of {len(bins)}; --json has all.")


def print_speed(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table("shape", "case", "program", "tokens/s p50", "p10 to p90", "roof, tokens/s", "of roof")
    for row in rows:
        speed = row["tokens_per_s"]
        table.add_row(
            *(row["shape"], row["case"], row["program"], f"{speed['p50']:.1f}"),
            *(f"{speed['p10']:.1f} to {speed['p90']:.1f}", f"{row['roof_tokens_per_s']:.1f}"),
            f"{100 * row['roof_share']:.0f} %",
        )
    console.print(table)
    for shape, row in {row["shape"]: row for row in rows}.items():
        console.print(
            f"{shape}: {row['dtype']}, {row['num_threads']} threads, {row['num_rounds']} rounds; the machine reads "
            f"{row['bandwidth_gb_per_s']:.1f} GB/s and multiplies {row['gemm_gflops']:.0f} GFLOP/s"
        )


def print_profile(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A column per row, a line per part."""
    table = Table("ms, median", *(f"{row['shape']}\n{row['case']}" for row in rows), "what")
    for part, what in PARTS.items():
        table.add_row(part, *(f"{row['parts_ms'][part]:.3f}" for row in rows), what)
    table.add_section()
    table.add_row("step", *(f"{row['step_ms']:.3f}" for row in rows), "from schedule to send")
    outside = [row["outside_forward_ms"] for row in rows]
    table.add_row("outside forward", *(f"{each['p50']:.3f}" for each in outside), "all but forward and logits")
    table.add_row("  p90", *(f"{each['p90']:.3f}" for each in outside), "")
    table.add_row("steps", *(str(row["num_steps"]) for row in rows), "that these medians are of")
    console.print(table)


def print_ratios(console: Console, ratios: Mapping[str, Ratio], *, num_rounds: int) -> None:
    table = Table("ratio", "value", "95 % interval", "goal", "")
    for name, ratio in ratios.items():
        goal = "" if ratio.goal is None else f"{'≤' if ratio.at_most else '≥'} {ratio.goal:g}"
        table.add_row(name, f"{ratio.value:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}", goal, ratio.verdict)
    console.print(table)
    if num_rounds < MIN_ROUNDS:
        console.print(f"Only {num_rounds} rounds: the intervals are too narrow. A claim needs {MIN_ROUNDS}.")
