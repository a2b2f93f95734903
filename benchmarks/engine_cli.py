"""`celeriac bench engine`: the engine process alone, against the machine, against vLLM, and under a loaded worker."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks import engine_report, report
from benchmarks.engine_cases import CASES
from benchmarks.engine_isolation import IsolationSpec, measure_isolation
from benchmarks.engine_profile import measure_profile
from benchmarks.engine_shapes import SHAPES
from benchmarks.engine_speed import SpeedSpec, first_cpus, measure_speed
from benchmarks.errors import BenchError
from benchmarks.machine import describe_machine
from benchmarks.stats import Ratio

OUTPUT_WIDTH = 140  # in a file or a pipe
QUIET_LOAD = 0.5
Printer = Callable[[Console, Sequence[dict[str, Any]]], None]


@click.command()
@click.option("--isolation", is_flag=True, help="A step in a loaded worker against the engine alone.")
@click.option("--profile", is_flag=True, help="Where a step's time goes.")
@click.option("--compare", type=click.Choice(["vllm"]), help="Run the same cases on vLLM, in a venv of its own.")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), help="Model shapes; else all.")
@click.option(
    "--case", "cases", multiple=True, type=click.Choice([case.name for case in CASES]), help="Cases; else all."
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="[default: bfloat16; isolation: float32]")
@click.option("--threads", type=click.IntRange(1), help="Threads of each program, one per core; else all cores.")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Interleaved rounds.")
@click.option("--decode-tokens", type=click.IntRange(2), default=32, show_default=True, help="Steps of a decode case.")
@click.option(
    "--num-requests",
    type=click.IntRange(64),
    default=256,
    show_default=True,
    help="Requests of a round of --isolation.",
)
@click.option("--model", default="", help="Model folder for --isolation; else tiny-chat.")
@click.option(
    "--vllm-venv", type=click.Path(file_okay=False, path_type=Path), help="Where vLLM is, or will be, installed."
)
@click.option("--vllm-eager", is_flag=True, help="vLLM without torch.compile.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def engine(
    isolation: bool,
    profile: bool,
    compare: str | None,
    shapes: tuple[str, ...],
    cases: tuple[str, ...],
    dtype: str | None,
    threads: int | None,
    rounds: int,
    decode_tokens: int,
    num_requests: int,
    model: str,
    vllm_venv: Path | None,
    vllm_eager: bool,
    as_json: bool,
) -> None:
    """Measure the engine process alone: decode and prefill speed, beside what the machine can do."""
    if sum((isolation, profile, compare is not None)) > 1:
        raise click.UsageError("--isolation, --profile and --compare exclude each other")
    load_before = os.getloadavg()[0]
    if load_before > QUIET_LOAD:
        _say(f"notice: other programs run here (load average {load_before:.1f}): only ratios of rounds mean something")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started is stopped
    try:
        if isolation:
            spec = IsolationSpec(num_rounds=rounds, num_requests=num_requests, model=model, dtype=dtype or "float32")
            rows, ratios = measure_isolation(spec, say=_say)
            _show(as_json, load_before, rows, ratios, printer=engine_report.print_isolation, num_rounds=rounds)
            return
        speed = SpeedSpec(
            shapes=shapes or tuple(SHAPES),
            cases=cases or tuple(case.name for case in CASES),
            num_rounds=rounds,
            dtype=dtype or "bfloat16",
            cpus=first_cpus(threads),
            decode_tokens=decode_tokens,
        )
        if profile:
            rows, ratios = measure_profile(speed, say=_say)
            _show(as_json, load_before, rows, ratios, printer=engine_report.print_profile, num_rounds=rounds)
            return
        rival = _vllm(vllm_venv, eager=vllm_eager) if compare else None
        rows, ratios = measure_speed(speed, say=_say, make_rival=rival)
        _show(as_json, load_before, rows, ratios, printer=engine_report.print_speed, num_rounds=rounds)
    except BenchError as error:
        raise click.ClickException(str(error)) from error


def _vllm(venv: Path | None, *, eager: bool) -> Callable[..., Any]:
    from benchmarks.engine_vllm import default_venv, ensure_venv, vllm_program

    return functools.partial(vllm_program, ensure_venv(venv or default_venv(), say=_say), eager=eager)


def _show(
    as_json: bool,
    load_before: float,
    rows: Sequence[dict[str, Any]],
    ratios: dict[str, Ratio],
    *,
    printer: Printer,
    num_rounds: int,
) -> None:
    machine = describe_machine()
    if as_json:
        facts = {"machine": machine["cpu"], "num_cores": machine["num_usable_cores"], "load_before": load_before}
        click.echo(report.to_json(report.result_object(machine, [{**row, **facts} for row in rows], ratios)))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=OUTPUT_WIDTH)
    engine_report.print_machine(console, machine)
    console.print(f"load average before the start: {load_before:.1f}")
    printer(console, rows)
    if ratios:
        engine_report.print_ratios(console, ratios, num_rounds=num_rounds)


def _say(line: str) -> None:
    """Progress, on standard error: standard output is for results."""
    click.echo(line, err=True)
