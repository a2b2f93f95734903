"""Results of `celeriac bench engine` for people: sheets, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.engine_profile import PARTS
from benchmarks.engine_steps import CONTEXT_BIN_TOKENS
from benchmarks.sheets import Sheet
from benchmarks.stats import MIN_ROUNDS, Ratio

MAX_BINS = 24  # shown; JSON has all
Row = Mapping[str, Any]


def machine_sheet(machine: Row, load_before: float) -> Sheet:
    line = (
        f"{machine['cpu']}, {machine['num_usable_cores']} of {machine['num_cores']} cores, "
        f"{machine['memory_gib']} GiB, {' '.join(machine['cpu_features'])}; "
        f"load average before the start: {load_before:.1f}"
    )
    return Sheet(notes=[line])


def isolation_sheets(rows: Sequence[Row]) -> list[Sheet]:
    """The whole, and the bins that the comparison rests on most, in the order of batch sizes."""
    total, bins = rows[0], [row for row in rows if row["row"] == "bin"]
    head = (
        f"{total['dtype']}, {total['num_rounds']} rounds, pure decode steps: {total['num_loaded_steps']} loaded, "
        f"{total['num_alone_steps']} alone, {total['num_compared_steps']} compared; "
        f"{total['num_failed_requests']} requests failed; p99 over p50 of a step: "
        f"{total['loaded_ms_p99_over_p50']:.2f} loaded, {total['alone_ms_p99_over_p50']:.2f} alone"
    )
    heaviest = sorted(bins, key=lambda row: min(row["num_loaded"], row["num_alone"]), reverse=True)[:MAX_BINS]
    lines = []
    for row in sorted(heaviest, key=lambda row: (row["num_seqs"], row["context_bin"])):
        low = CONTEXT_BIN_TOKENS * row["context_bin"]
        counts = [str(row["num_seqs"]), f"{low} to {low + CONTEXT_BIN_TOKENS - 1}"]
        counts += [str(row["num_loaded"]), str(row["num_alone"])]
        lines.append([*counts, f"{row['loaded_ms']:.2f}", f"{row['alone_ms']:.2f}", f"{row['ratio']:.3f}"])
    columns = ("batch", "context per seq", "steps loaded", "steps alone", "loaded, ms", "alone, ms", "ratio")
    more = [f"The {MAX_BINS} bins with the most steps, of {len(bins)}; --json has all."] if len(bins) > MAX_BINS else []
    return [Sheet(notes=[total["layout"], head]), Sheet(columns, lines, more)]


def speed_sheets(rows: Sequence[Row]) -> list[Sheet]:
    """Speeds beside the roofs: of a decode step the bytes that it must read, of a prefill its operations."""
    lines = []
    for row in rows:
        speed, is_decode = row["tokens_per_s"], row["case"].startswith("decode")
        work = f"{row['step_bytes'] / 1e6:,.0f} MB" if is_decode else f"{row['step_flops'] / 1e9:,.0f} GFLOP"
        rate, roof = (
            (f"{row['achieved_gb_per_s']:.1f} GB/s", f"{row['bandwidth_gb_per_s']:.1f} GB/s")
            if is_decode
            else (f"{row['achieved_gflops']:.0f} GFLOP/s", f"{row['gemm_gflops']:.0f} GFLOP/s")
        )
        cells = [row["shape"], row["case"], row["program"], f"{speed['p50']:,.1f}"]
        cells += [f"{speed['p10']:,.1f} to {speed['p90']:,.1f}", work, rate, roof]
        lines.append([*cells, f"{row['roof_tokens_per_s']:,.1f}", f"{100 * row['roof_share']:.0f} %"])
    columns = (
        *("shape", "case", "program", "tokens/s p50", "p10 to p90", "work of a step", "achieved", "machine"),
        *("roof, tokens/s", "of roof"),
    )
    notes = [
        f"{shape}: {row['dtype']} on {row['device']}, {row['num_threads']} threads, {row['num_rounds']} rounds; the "
        f"machine reads {row['bandwidth_gb_per_s']:.1f} GB/s and multiplies {row['gemm_gflops']:.0f} GFLOP/s"
        for shape, row in {row["shape"]: row for row in rows}.items()
    ]
    return [Sheet(columns, lines, notes)]


def profile_sheets(rows: Sequence[Row]) -> list[Sheet]:
    """A column per row, a line per part: the time that passed, and CPU time where it differs by 0.01 ms."""
    lines = [[part, *(_part_cell(row, part) for row in rows), what] for part, what in PARTS.items()]
    lines.append(["step", *(f"{row['step_ms']:.3f}" for row in rows), "from schedule to send"])
    outside = [row["outside_forward_ms"] for row in rows]
    lines.append(["outside forward", *(f"{each['p50']:.3f}" for each in outside), "all but forward and logits"])
    lines.append(["outside forward, CPU", *(f"{row['outside_forward_cpu_ms']:.3f}" for row in rows), "of our thread"])
    lines.append(["outside forward, p90", *(f"{each['p90']:.3f}" for each in outside), ""])
    lines.append(["steps", *(str(row["num_steps"]) for row in rows), "that these medians are of"])
    return [
        Sheet(("ms, median", *(f"{row['shape']}\n{row['case']}\n{row['sampling']}" for row in rows), "what"), lines)
    ]


def _part_cell(row: Row, part: str) -> str:
    passed, cpu = row["parts_ms"][part], row["cpu_ms"][part]
    return f"{passed:.3f}" if abs(passed - cpu) < 0.01 else f"{passed:.3f} (CPU {cpu:.3f})"


def determinism_sheets(rows: Sequence[Row]) -> list[Sheet]:
    """How many prompts got other tokens in a batch than alone."""
    lines = []
    for row in rows:
        first = row["first_difference"]
        where = f"{first['p50']:.0f}" if row["num_differing"] else ""
        cells = [row["shape"], row["variant"], str(row["num_prompts"])]
        lines.append([*cells, f"{row['num_differing']}", where])
    columns = ("shape", "engine", "prompts", "other tokens in a batch", "first difference at token, p50")
    row = rows[0]
    note = (
        f"{row['dtype']}, {row['num_threads']} threads, {row['output_len']} tokens per prompt, greedy: alone against "
        f"{row['batch']} at once. `as set`: linears by `engine.linear: auto`. "
        "A cost is how many times as long the case takes with determinism."
    )
    return [Sheet(columns, lines, [note])]


def speculation_sheets(rows: Sequence[Row]) -> list[Sheet]:
    """What guesses bring, by how many of them are right."""
    lines = [
        [
            *(row["shape"], row["prompts"], f"{row['off_tokens_per_s']:,.0f}", f"{row['on_tokens_per_s']:,.0f}"),
            *(f"{row['tokens_per_step']:.2f}", f"{row['acceptance']:.0%}", f"{row['draft_tokens']:,.0f}"),
            str(row["num_differing"]),
        ]
        for row in rows
    ]
    columns = (
        "shape",
        "prompts",
        "off, tokens/s",
        "on, tokens/s",
        "tokens per step",
        "kept",
        "guesses",
        "other outputs",
    )
    row = rows[0]
    note = (
        f"{row['dtype']}, {row['num_threads']} threads, {row['num_rounds']} rounds of {row['num_prompts']} prompts one "
        f"at a time, {row['output_len']} tokens each, greedy. Ratio: seconds without guesses by seconds with them."
    )
    return [Sheet(columns, lines, [note])]


def memory_sheets(rows: Sequence[Row]) -> list[Sheet]:
    """What a long prompt takes beyond the model: its KV, and the working memory of one chunk."""
    lines = [
        [
            *(row["shape"], f"{row['num_prompt_tokens']:,}", f"{row['tokens_per_s']:,.0f}"),
            *(f"{row[name] / 1e6:,.0f}" for name in ("kv_bytes", "working_bytes", "working_bytes_max", "peak_bytes")),
        ]
        for row in rows
    ]
    columns = (
        *("shape", "prompt tokens", "tokens/s", "its KV, MB", "working memory, MB, p50", "most"),
        "peak RSS of the engine, MB",
    )
    row = rows[0]
    note = (
        f"{row['dtype']}, {row['num_threads']} threads, {row['num_rounds']} rounds, chunks of {row['chunk_tokens']} "
        "tokens. Working memory: peak RSS, less RSS before the prompt and the pages of KV and model touched since."
    )
    return [Sheet(columns, lines, [note])]


def ratio_sheets(ratios: Mapping[str, Ratio]) -> list[Sheet]:
    """What each ratio is, between what it lies with 95 %, and what that says about its goal."""
    if not ratios:
        return []
    lines = []
    for name, ratio in ratios.items():
        goal = "" if ratio.goal is None else f"{'≤' if ratio.at_most else '≥'} {ratio.goal:g}"
        rounds = "" if ratio.num_rounds is None else str(ratio.num_rounds)
        interval = f"{ratio.low:.3f} to {ratio.high:.3f}"
        lines.append([f"`{name}`", rounds, f"{ratio.value:.3f}", interval, goal, ratio.verdict])
    fewest = min((r.num_rounds for r in ratios.values() if r.num_rounds is not None), default=MIN_ROUNDS)
    notes = [f"A claim needs {MIN_ROUNDS} rounds; fewer give intervals that are too narrow."]
    columns = ("ratio", "rounds", "value", "95 % interval", "goal", "verdict")
    return [Sheet(columns, lines, notes if fewest < MIN_ROUNDS else [])]
