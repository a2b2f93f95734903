"""`celeriac bench kv`: KV transfers between two processes of this machine, against memmove in the same round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table

from benchmarks import engine_report, report
from benchmarks.errors import ProgramFailed
from benchmarks.machine import describe_machine
from benchmarks.sheets import print_sheets
from benchmarks.stats import Ratio, paired_ratio, percentile

ROOT = Path(__file__).resolve().parents[1]
PROGRAM: Final = "kvstore.transport.measure_rounds"
TIMEOUT_S: Final = 1800
PROTOCOLS: Final = ("shm", "tcp", "rdma")
GOALS: Final = {"shm_contiguous": 0.85, "shm_16k": 0.60, "tcp_contiguous": 0.25, "rdma_contiguous": 0.30}
NO_GOAL: Final = ("tcp_16k", "rdma_16k")
NOTICE_GOAL_US: Final = {"shm": 150.0, "tcp": 200.0}
INTEGRITY_GOAL: Final = 0.99
OUTPUT_WIDTH: Final = 120


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=12, show_default=True, help="Interleaved rounds.")
@click.option("--mib", type=click.IntRange(1, 4096), default=64, show_default=True, help="MiB of one transfer.")
@click.option(
    "--protocol",
    "protocols",
    type=click.Choice(PROTOCOLS),
    multiple=True,
    default=("shm", "tcp"),
    show_default=True,
    help="Transport to measure; may be given several times. rdma: NIXL, over tcp where no device is.",
)
@click.option(
    "--case",
    "words",
    multiple=True,
    help="Measure only cases with this in their name, such as `notice` or `16k`; may be given several times.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def kv(rounds: int, mib: int, protocols: tuple[str, ...], words: tuple[str, ...], as_json: bool) -> None:
    """Measure KV transfers: large and 16 KiB blocks, with and without checksum, 1 to 8 pairs at once; over shm and tcp
    also pairs of unlike layouts: half of the heads, blocks of 16 into 32 tokens, bfloat16 into float32, compressed.

    Time of a transfer: from the push until the writer knows that the KV was handed over. Of a notice: from the push of
    64 KiB until the receiving engine has heard that it is there; its checksum is on.
    """
    load_before = os.getloadavg()[0]
    try:
        measured = run_program(rounds, mib, list(dict.fromkeys(protocols)), words)
    except ProgramFailed as error:
        raise click.ClickException(str(error)) from error
    rows, ratios = summarize_rounds(measured)
    machine = describe_machine()
    if as_json:
        rows = [{**row, "load_before": load_before} for row in rows]
        click.echo(report.to_json(report.result_object(machine, rows, ratios)))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=OUTPUT_WIDTH)
    print_sheets(console, [engine_report.machine_sheet(machine, load_before)])
    console.print(f"{rounds} rounds of {mib} MiB")
    _print_rows(console, rows)
    print_sheets(console, engine_report.ratio_sheets(ratios))


def run_program(num_rounds: int, mib: int, protocols: Sequence[str], words: Sequence[str] = ()) -> dict[str, Any]:
    """The raw seconds of every case and round.

    Raises:
        ProgramFailed: it ended with an error, or hangs.
    """
    command = [sys.executable, "-m", PROGRAM, str(num_rounds), str(mib), ",".join(protocols), *words]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        raise ProgramFailed(PROGRAM, f"left with {error.returncode}", error.stderr[-2000:]) from error
    except subprocess.TimeoutExpired as error:
        raise ProgramFailed(PROGRAM, f"did not end within {TIMEOUT_S} s", "") from error
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def summarize_rounds(measured: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Ratio]]:
    """A row for each case, and the ratios with their goals."""
    rounds = measured["rounds"]
    seconds = {name: [one["seconds"][name] for one in rounds] for name in rounds[0]["seconds"]}
    rows: list[dict[str, Any]] = [
        _speed_row(name, times, num_bytes=measured["num_bytes"] * _num_pairs(name)) for name, times in seconds.items()
    ]
    rows.sort(key=lambda row: (row["case"] != "memcpy", row["case"]))
    ratios = {
        f"{_ratio_name(name)}_vs_memcpy": paired_ratio(seconds["memcpy"], seconds[name], goal=GOALS.get(name))
        for name in (*GOALS, *NO_GOAL)
        if name in seconds
    }
    for name in ("shm_heads", "shm_blocks", "shm_widen", "tcp_heads", "tcp_blocks", "tcp_widen"):
        if name in seconds:
            ratios[f"{name}_vs_memcpy"] = paired_ratio(seconds["memcpy"], seconds[name])
    for protocol in rounds[0]["notice_s"]:
        per_round_us = [percentile(one["notice_s"][protocol], 0.5) * 1e6 for one in rounds]
        every_us = [s * 1e6 for one in rounds for s in one["notice_s"][protocol]]
        rows.append({"case": f"{protocol}_64k_notice", **{f"p{q}_us": percentile(every_us, q / 100) for q in (50, 99)}})
        if protocol not in NOTICE_GOAL_US:
            continue
        goal_us = NOTICE_GOAL_US[protocol]
        name = f"{protocol}_64k_notice_p50_vs_{goal_us:g}us"
        ratios[name] = paired_ratio(per_round_us, [goal_us] * len(rounds), goal=1.0, at_most=True)
    for name in [name for name in ("hash", "copy_and_hash") if name in seconds]:
        ratios[f"{name}_vs_memcpy"] = paired_ratio(seconds["memcpy"], seconds[name])
    checked = ("shm_contiguous", "shm_16k", "tcp_contiguous", "rdma_contiguous")
    for name in [name for name in checked if name in seconds and f"{name}_checked" in seconds]:
        ratio = paired_ratio(seconds[name], seconds[f"{name}_checked"], goal=INTEGRITY_GOAL)
        ratios[f"{_ratio_name(name)}_checked_vs_unchecked"] = ratio
    return rows, ratios


def _ratio_name(case: str) -> str:
    """Ratios over rdma carry the name of what moves the bytes."""
    return case.replace("rdma", "nixl")


def _num_pairs(name: str) -> int:
    return int(name.rpartition("_")[2]) if "_pairs_" in name else 1


def _speed_row(name: str, times_s: Sequence[float], *, num_bytes: int) -> dict[str, Any]:
    rates = [num_bytes / seconds / 1e9 for seconds in times_s]
    names = {"gb_per_s_p50": 0.5, "gb_per_s_p10": 0.1, "gb_per_s_p90": 0.9}
    return {"case": name, "num_bytes": num_bytes, **{key: percentile(rates, q) for key, q in names.items()}}


def _print_rows(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table("case", "GB/s p50", "p10", "p90")
    for row in rows:
        if "gb_per_s_p50" in row:
            table.add_row(row["case"], *(f"{row[f'gb_per_s_p{q}']:.2f}" for q in (50, 10, 90)))
    console.print(table)
    for row in rows:
        if "p50_us" in row:
            console.print(f"{row['case']}: p50 {row['p50_us']:.0f} us, p99 {row['p99_us']:.0f} us")
