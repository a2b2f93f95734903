"""Speed of the engine process alone, beside what the machine can do, and beside the rivals that are asked for.

Per shape all programs are up at once; in a round each case runs on each program, in alternating order, and the roofs
are measured between them. So a ratio of one round has both sides from about the same seconds.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine_cases import CASES, Case, Roof
from benchmarks.engine_program import ROOT, Program
from benchmarks.engine_progress import RoundClock
from benchmarks.engine_rivals import MakeRival, Say
from benchmarks.engine_shapes import SHAPES, Shape, write_checkpoint
from benchmarks.engine_solo import OURS, solo_program
from benchmarks.errors import TooFewCores
from benchmarks.stats import Ratio, paired_ratio, percentile

BANDWIDTH_GOAL = 0.75  # of decode at batch 1
GOALS_ARE_VS = "vllm"


@dataclass(frozen=True)
class SpeedSpec:
    """`dtype`: float32 or bfloat16. `cpus`: cores of every program, one thread each. `device`: cpu or cuda."""

    shapes: tuple[str, ...]
    cases: tuple[str, ...]
    num_rounds: int
    dtype: str
    cpus: tuple[int, ...]
    decode_tokens: int = 32
    device: str = "cpu"

    def chosen_cases(self) -> list[Case]:
        return [case for case in CASES if case.name in self.cases]


@dataclass
class _Samples:
    """Tokens per second by program, and the roof, one entry per round."""

    speeds: dict[str, list[float]]
    roofs: list[float]


def measure_speed(
    spec: SpeedSpec, *, say: Say, rivals: Sequence[MakeRival] = ()
) -> tuple[list[dict[str, Any]], dict[str, Ratio]]:
    """A row per shape, case and program; ratios to the roof and to each of `rivals`.

    Raises:
        BenchError: a program failed.
    """
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    with _rates_program(spec) as rates:  # before weights are written: a device that is not there is refused at once
        say(f"measuring on {rates.facts['device']}")
    for name in spec.shapes:
        shape = SHAPES[name]
        with model_folder(shape, say) as model, ExitStack() as stack:
            say(f"{name}: starting programs")
            programs = [stack.enter_context(solo_program(model, spec.cpus, spec.dtype, device=spec.device))]
            programs += [stack.enter_context(make(model, spec.cpus, spec.dtype)) for make in rivals]
            rates = stack.enter_context(_rates_program(spec))
            samples, roofs = _run_rounds(spec, shape, programs, rates, say)
        for case in spec.chosen_cases():
            rows += _rows(spec, shape, case, samples[case.name], roofs)
            ratios.update(_ratios(shape, case, samples[case.name]))
    return rows, ratios


def first_cpus(num_threads: int | None) -> tuple[int, ...]:
    """The first cores that this process may use; all of them for None.

    Raises:
        TooFewCores: there are fewer.
    """
    usable = sorted(os.sched_getaffinity(0))
    if num_threads is not None and num_threads > len(usable):
        raise TooFewCores(needed=num_threads, usable=len(usable), what=f"--threads {num_threads}")
    return tuple(usable[:num_threads])


@contextmanager
def model_folder(shape: Shape, say: Say) -> Iterator[Path]:
    """The folder of a shape's model, made on the spot and removed afterwards if it has none."""
    if shape.folder:
        yield ROOT / shape.folder
        return
    with tempfile.TemporaryDirectory(prefix=f"celeriac-{shape.name}-") as folder:
        say(f"{shape.name}: writing random weights")
        write_checkpoint(shape, Path(folder))
        yield Path(folder)


def _rates_program(spec: SpeedSpec) -> Program:
    cpus = ",".join(map(str, spec.cpus))
    argv = [sys.executable, "-m", "engines.machine_rates", "--cpus", cpus, "--dtype", spec.dtype]
    argv += ["--device", spec.device]
    return Program("engines.machine_rates", argv, env={})


def _run_rounds(
    spec: SpeedSpec, shape: Shape, programs: Sequence[Program], rates: Program, say: Say
) -> tuple[dict[str, _Samples], list[Roof]]:
    cases = spec.chosen_cases()
    samples = {case.name: _Samples({program.name: [] for program in programs}, []) for case in cases}
    roofs: list[Roof] = []
    clock = RoundClock(shape.name, num_rounds=spec.num_rounds, num_parts=len(cases))
    for k in range(-1, spec.num_rounds):  # round -1 is a warm-up: first uses of each shape cost more
        roof = _measure_roof(rates)
        for number, case in enumerate(cases):
            order = turned(programs, k + number)
            speeds = {
                program.name: case.measure(program.run, decode_tokens=spec.decode_tokens, seed=1000 * (k + 2) + number)
                for program in order
            }
            if k >= 0:
                for name, speed in speeds.items():
                    samples[case.name].speeds[name].append(speed)
                work = case.work(shape, decode_tokens=spec.decode_tokens, dtype=spec.dtype)
                samples[case.name].roofs.append(work.tokens_per_s(roof))
            figures = ", ".join(f"{name} {speed:.1f}" for name, speed in sorted(speeds.items()))
            say(clock.line(k, number, f"{case.name}: {figures} tokens/s"))
        if k >= 0:
            roofs.append(roof)
    return samples, roofs


def turned(programs: Sequence[Program], turn: int) -> list[Program]:
    """Every program comes first, and every two of them in either order, as `turn` goes up."""
    start = turn // 2 % len(programs)
    order = [*programs[start:], *programs[:start]]
    return order[::-1] if turn % 2 else order


def _measure_roof(rates: Program) -> Roof:
    bandwidth, gemm = rates.run({"measure": "bandwidth"}), rates.run({"measure": "gemm"})
    return Roof(bandwidth["bytes"] / bandwidth["seconds"], gemm["flops"] / gemm["seconds"])


def _rows(
    spec: SpeedSpec, shape: Shape, case: Case, samples: _Samples, roofs: Sequence[Roof]
) -> Iterator[dict[str, Any]]:
    work = case.work(shape, decode_tokens=spec.decode_tokens, dtype=spec.dtype)
    for name, speeds in samples.speeds.items():
        good = [speed for speed in speeds if math.isfinite(speed)]
        steps_per_s = percentile(good, 0.5) / work.num_tokens
        yield {
            "shape": shape.name,
            "case": case.name,
            "program": name,
            "dtype": spec.dtype,
            "device": spec.device,
            "num_threads": len(spec.cpus),
            "num_rounds": len(good),
            "tokens_per_s": {"p10": percentile(good, 0.1), "p50": percentile(good, 0.5), "p90": percentile(good, 0.9)},
            "roof_tokens_per_s": percentile(samples.roofs, 0.5),
            "roof_share": paired_ratio(speeds, samples.roofs).value,
            "step_bytes": work.num_bytes,
            "step_flops": work.flops,
            "achieved_gb_per_s": steps_per_s * work.num_bytes / 1e9,
            "achieved_gflops": steps_per_s * work.flops / 1e9,
            "bandwidth_gb_per_s": percentile([roof.bytes_per_s / 1e9 for roof in roofs], 0.5),
            "gemm_gflops": percentile([roof.flops_per_s / 1e9 for roof in roofs], 0.5),
        }


def _ratios(shape: Shape, case: Case, samples: _Samples) -> dict[str, Ratio]:
    ours = samples.speeds[OURS]
    goal = BANDWIDTH_GOAL if case.name == "decode_b1" and not shape.folder else None
    ratios = {f"{case.name}_{shape.name}_vs_roof": paired_ratio(ours, samples.roofs, goal=goal)}
    for name, speeds in samples.speeds.items():
        if name != OURS:
            rival_goal = case.goal if name == GOALS_ARE_VS else None
            ratios[f"{case.name}_{shape.name}_vs_{_word(name)}"] = paired_ratio(ours, speeds, goal=rival_goal)
    return ratios


def _word(name: str) -> str:
    """`name` as a part of a ratio's name."""
    return name.replace(".", "_")
