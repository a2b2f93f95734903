"""`celeriac bench engine`: the engine process alone, against the machine, against rivals, and under a loaded worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from benchmarks import engine_report, report
from benchmarks.engine_cases import CASES
from benchmarks.engine_determinism import measure_determinism
from benchmarks.engine_isolation import IsolationSpec, measure_isolation
from benchmarks.engine_memory import MemorySpec, made_shapes, measure_memory, quarters
from benchmarks.engine_profile import SAMPLINGS, measure_profile
from benchmarks.engine_rivals import RIVALS, RivalOptions
from benchmarks.engine_shapes import SHAPES
from benchmarks.engine_speculation import SpeculationSpec, measure_speculation
from benchmarks.engine_speed import SpeedSpec, first_cpus, measure_speed
from benchmarks.errors import BenchError
from benchmarks.machine import describe_machine
from benchmarks.sheets import Sheet, markdown, print_sheets
from benchmarks.stats import Ratio

OUTPUT_WIDTH: Final = 160  # in a file or a pipe
QUIET_LOAD: Final = 0.5
MIN_LONG_CONTEXT: Final = 1024


@dataclass(frozen=True)
class _Result:
    """`name`: of the mode, for the files of --save."""

    name: str
    rows: list[dict[str, Any]]
    ratios: dict[str, Ratio]
    sheets: Callable[[Sequence[dict[str, Any]]], list[Sheet]]


@click.command()
@click.option("--isolation", is_flag=True, help="A step in a loaded worker against the engine alone.")
@click.option("--profile", is_flag=True, help="Where a step's time goes.")
@click.option(
    "--sampling",
    "samplings",
    multiple=True,
    type=click.Choice(list(SAMPLINGS)),
    help="How tokens are chosen in --profile; may be repeated. [default: greedy]",
)
@click.option("--speculation", is_flag=True, help="Guesses by prompt look-up against none, one prompt at a time.")
@click.option("--determinism", is_flag=True, help="How often tokens depend on the batch, and what it costs if not.")
@click.option(
    "--long-context",
    type=click.IntRange(MIN_LONG_CONTEXT),
    metavar="TOKENS",
    help="Memory for prompts of a quarter, half and all of so many tokens, in chunks. [default shape: 135m]",
)
@click.option(
    "--compare",
    "rivals",
    multiple=True,
    type=click.Choice(list(RIVALS)),
    help="Run the same cases on this program; may be repeated. vllm and llama.cpp get a venv of their own; "
    "int8 and int4 are our engine with quantised weights.",
)
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), help="Model shapes; else all.")
@click.option(
    "--case", "cases", multiple=True, type=click.Choice([case.name for case in CASES]), help="Cases; else all."
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="[default: bfloat16; isolation: float32]")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where the engine computes. cuda: decode and prefill speed beside what the GPU can do.",
)
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
@click.option(
    "--llama-cpp-venv",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where llama.cpp is, or will be, compiled and installed.",
)
@click.option("--vllm-eager", is_flag=True, help="vLLM without torch.compile.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option(
    "--save",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Also write engine-MODE.json and engine-MODE.md, the tables as Markdown, there.",
)
def engine(
    isolation: bool,
    profile: bool,
    samplings: tuple[str, ...],
    speculation: bool,
    determinism: bool,
    long_context: int | None,
    rivals: tuple[str, ...],
    shapes: tuple[str, ...],
    cases: tuple[str, ...],
    dtype: str | None,
    device: str,
    threads: int | None,
    rounds: int,
    decode_tokens: int,
    num_requests: int,
    model: str,
    vllm_venv: Path | None,
    llama_cpp_venv: Path | None,
    vllm_eager: bool,
    as_json: bool,
    save: Path | None,
) -> None:
    """Measure the engine process alone: decode and prefill speed, beside what the machine can do."""
    num_modes = sum((isolation, profile, speculation, determinism, long_context is not None, bool(rivals)))
    if num_modes + (device == "cuda") > 1:
        names = "--isolation, --profile, --speculation, --determinism, --long-context, --compare and --device cuda"
        raise click.UsageError(f"{names} exclude each other")
    if samplings and not profile:
        raise click.UsageError("--sampling goes with --profile")
    load_before = os.getloadavg()[0]
    if load_before > QUIET_LOAD:
        _say(f"notice: other programs run here (load average {load_before:.1f}): only ratios of rounds mean something")
    signal.signal(signal.SIGTERM, _interrupt_once)
    try:
        if isolation:
            spec = IsolationSpec(num_rounds=rounds, num_requests=num_requests, model=model, dtype=dtype or "float32")
            result = _Result("isolation", *measure_isolation(spec, say=_say), engine_report.isolation_sheets)
        elif speculation:
            guessing = SpeculationSpec(
                shapes=shapes or ("tiny-chat", "135m"),
                num_rounds=rounds,
                dtype=dtype or "bfloat16",
                cpus=first_cpus(threads),
                output_len=decode_tokens,
            )
            sheets = engine_report.speculation_sheets
            result = _Result("speculation", *measure_speculation(guessing, say=_say), sheets)
        elif long_context is not None:
            memory = MemorySpec(
                shapes=made_shapes(shapes or ("135m",)),
                lengths=quarters(long_context),
                num_rounds=rounds,
                dtype=dtype or "bfloat16",
                cpus=first_cpus(threads),
            )
            if not memory.shapes:
                raise click.UsageError("--long-context needs a shape whose weights are made on the spot: 135m or 05b")
            result = _Result("long-context", *measure_memory(memory, say=_say), engine_report.memory_sheets)
        else:
            speed = SpeedSpec(
                shapes=shapes or tuple(SHAPES),
                cases=cases or tuple(case.name for case in CASES),
                num_rounds=rounds,
                dtype=dtype or "bfloat16",
                cpus=first_cpus(threads),
                decode_tokens=decode_tokens,
                device=device,
            )
            venvs = {"vllm": vllm_venv, "llama.cpp": llama_cpp_venv}
            options = RivalOptions({name: path for name, path in venvs.items() if path}, vllm_eager)
            if profile:
                found = measure_profile(speed, say=_say, samplings=samplings or ("greedy",))
                result = _Result("profile", *found, engine_report.profile_sheets)
            else:
                result = _measure(speed, rivals, options, is_determinism=determinism)
    except BenchError as error:
        raise click.ClickException(str(error)) from error
    _show(result, load_before, as_json=as_json, save=save)


def _measure(speed: SpeedSpec, rivals: Sequence[str], options: RivalOptions, *, is_determinism: bool) -> _Result:
    if is_determinism:
        return _Result("determinism", *measure_determinism(speed, say=_say), engine_report.determinism_sheets)
    makers = [RIVALS[name](options, _say) for name in dict.fromkeys(rivals)]
    name = "-".join(["speed", *(f"vs-{rival}" for rival in dict.fromkeys(rivals))])
    return _Result(name, *measure_speed(speed, say=_say, rivals=makers), engine_report.speed_sheets)


def _show(result: _Result, load_before: float, *, as_json: bool, save: Path | None) -> None:
    machine = describe_machine()
    facts = {"machine": machine["cpu"], "num_cores": machine["num_usable_cores"], "load_before": load_before}
    text = report.to_json(report.result_object(machine, [{**row, **facts} for row in result.rows], result.ratios))
    sheets = [
        engine_report.machine_sheet(machine, load_before),
        *result.sheets(result.rows),
        *engine_report.ratio_sheets(result.ratios),
    ]
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        save.joinpath(f"engine-{result.name}.json").write_text(text + "\n")
        save.joinpath(f"engine-{result.name}.md").write_text(markdown(sheets))
        _say(f"written: {save}/engine-{result.name}.json and .md")
    if as_json:
        click.echo(text)
        return
    console = Console()
    print_sheets(console if console.is_terminal else Console(width=OUTPUT_WIDTH), sheets)


def _interrupt_once(*_: object) -> None:
    """SIGTERM, as Ctrl-C: what was started is stopped. `timeout` sends it twice: a second must not interrupt that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _say(line: str) -> None:
    """Progress, on standard error: standard output is for results."""
    click.echo(line, err=True)
