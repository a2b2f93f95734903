"""`celeriac bench`: measure a running server, compare two layouts of this machine, or measure the engine alone."""

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import report
from benchmarks.cluster import Cluster, describe_layout
from benchmarks.compare import compare as compare_clusters
from benchmarks.engine_cli import engine
from benchmarks.errors import BenchError
from benchmarks.kv import kv
from benchmarks.load import LoadSpec, parse_lengths, plan_load
from benchmarks.machine import describe_machine
from benchmarks.serve import Slo, run_load, summarize_run

_LABEL = re.compile(r'(\w+)="([^"]*)"')
Command = TypeVar("Command", bound=Callable[..., Any])


@click.group()
def bench() -> None:
    """Measure a cluster from the outside."""


bench.add_command(engine)
bench.add_command(kv)


def load_options(command: Command) -> Command:
    """Options that describe the load and its targets."""
    for option in reversed(
        [
            click.option("--rate", default=2.0, show_default=True, help="Requests per second (Poisson); inf: at once."),
            click.option("--num-requests", type=click.IntRange(1), help="End after this many requests."),
            click.option("--duration", type=click.FloatRange(0, min_open=True), help="End after this many seconds."),
            click.option("--input-len", default="64", show_default=True,
                         help="Prompt tokens: N, uniform:LOW-HIGH or lognormal:MEDIAN,SIGMA[,MAX]."),
            click.option("--output-len", default="32", show_default=True, help="Output tokens, likewise."),
            click.option("--slo-ttft-ms", type=float, default=float("inf"), help="Target of TTFT, for goodput."),
            click.option("--slo-tpot-ms", type=float, default=float("inf"), help="Target of TPOT, for goodput."),
            click.option("--seed", default=0, show_default=True, help="Same seed, same load."),
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables."),
            click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Plot file."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


@bench.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The gateway.")
@click.option("--concurrency-limit", type=click.IntRange(0), default=0, help="Requests in flight at most; 0: no limit.")
@click.option("--layout", default="", help="How the server is laid out, for the row; else read from /metrics.")
@load_options
def serve(url: str, concurrency_limit: int, layout: str, as_json: bool, plot: Path | None, **load: Any) -> None:
    """Send an open-loop load to a running server."""
    spec, slo = _load_spec(**load)
    with _friendly_errors(), _progress(len(plan_load(spec)), "requests") as advance:
        run = asyncio.run(run_load(url, spec, concurrency_limit=concurrency_limit, on_done=advance))
    row = summarize_run(run, layout=layout or _layout_of(url), rate_rps=spec.rate_rps, slo=slo)
    _show(as_json=as_json, plot=plot, rows=[row], ratios={})
    if not row["num_ok"]:
        sys.exit(1)


@bench.command()
@click.option("--both", "num_both", type=click.IntRange(1), default=2, show_default=True, help="Workers of role both.")
@click.option("--prefill", type=click.IntRange(1), default=1, show_default=True, help="Prefill workers.")
@click.option("--decode", type=click.IntRange(1), default=1, show_default=True, help="Decode workers.")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Interleaved rounds.")
@click.option("--model", default="", help="Model of both clusters; else the default one.")
@load_options
def compare(
    num_both: int, prefill: int, decode: int, rounds: int, model: str, as_json: bool, plot: Path | None, **load: Any
) -> None:
    """Run the same load on `both` workers and on prefill + decode workers of this machine."""
    spec, slo = _load_spec(**load)
    common = ["--model", model] if model else []
    with tempfile.TemporaryDirectory(prefix="celeriac-bench-") as folder, _friendly_errors():
        flags = ["--prefill", str(prefill), "--decode", str(decode), *common]
        with (
            Cluster(Path(folder, "both"), ["--both", str(num_both), *common]) as both,
            Cluster(Path(folder, "disaggregated"), flags) as disaggregated,
            _progress(2 * rounds, "runs") as advance,
        ):
            rows, ratios = compare_clusters(both, disaggregated, spec, num_rounds=rounds, slo=slo, on_round=advance)
    _show(as_json=as_json, plot=plot, rows=rows, ratios=ratios)


def _load_spec(
    *,
    rate: float,
    num_requests: int | None,
    duration: float | None,
    input_len: str,
    output_len: str,
    slo_ttft_ms: float,
    slo_tpot_ms: float,
    seed: int,
) -> tuple[LoadSpec, Slo]:
    if num_requests is not None and duration is not None:
        raise click.UsageError("--num-requests and --duration exclude each other")
    if num_requests is None and duration is None:
        num_requests = 20
    if not rate > 0:
        raise click.BadParameter("expected a positive number, or inf", param_hint="--rate")
    if rate == float("inf") and duration is not None:
        raise click.UsageError("--rate inf needs --num-requests: everything is sent at once")
    with _friendly_errors():
        spec = LoadSpec(rate, parse_lengths(input_len), parse_lengths(output_len), num_requests, duration, seed)
    return spec, Slo(slo_ttft_ms, slo_tpot_ms)


def _show(*, as_json: bool, plot: Path | None, rows: list[dict[str, Any]], ratios: dict[str, Any]) -> None:
    machine = describe_machine()
    if as_json:
        click.echo(report.to_json(report.result_object(machine, rows, ratios)))
    else:
        console = Console()
        report.print_rows(console, machine, rows)
        if ratios:
            report.print_ratios(console, ratios, num_rounds=rows[0]["num_valid_rounds"])
    if plot is not None:
        report.plot_rows(plot, rows)


def _layout_of(url: str) -> str:
    """Roles of the workers behind a gateway, from its metrics; "unknown" for another kind of server."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=5) as response:
            metrics = response.read().decode(errors="replace")
    except OSError:
        return "unknown"
    workers = [dict(_LABEL.findall(line)) for line in metrics.splitlines() if line.startswith("celeriac_worker_up{")]
    return describe_layout(workers) if workers else "unknown"


@contextmanager
def _friendly_errors() -> Iterator[None]:
    try:
        yield
    except BenchError as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def _progress(total: int, unit: str) -> Iterator[Callable[[], None]]:
    """A bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(unit, total=total)
        yield lambda: progress.advance(task)
