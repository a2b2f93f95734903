"""A step in a loaded worker against the engine alone: what front, gateway, Redis and transfers cost the engine.

    cores of the decode engine   loaded: the decode engine of `celeriac up`      alone: the engine of `engines.solo`
    other cores                  prefill engine, fronts, gateway, Redis, client  the feeder

Both stay up; rounds alternate, and the idle one waits in poll. Compared are pure decode steps of equal batch size and
about equal context, by the engines' own step logs.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cluster import Cluster
from benchmarks.engine_pinning import allowed_cores, engine_pids, pin_all_but, pinned_self
from benchmarks.engine_program import Program
from benchmarks.engine_steps import BinRatio, Step, StepLogReader, batch_sizes, match_bins, mean_cpu_ratio, mean_ratio
from benchmarks.errors import TooFewCores
from benchmarks.load import LoadSpec, Uniform
from benchmarks.serve import run_load
from benchmarks.stats import Ratio, paired_ratio, percentile

RATIO = "step_loaded_vs_alone"
CPU_RATIO = "step_cpu_loaded_vs_alone"
GOAL = 1.05
NUM_STREAMS = 64
MAX_NUM_SEQS = 96  # room for those that arrive while others leave, so that 64 streams are 64 sequences

Say = Callable[[str], None]


@dataclass(frozen=True)
class IsolationSpec:
    """`model` "": the default one. `dtype` as `celeriac up` takes it. Output lengths are uniform."""

    num_rounds: int
    num_requests: int
    model: str = ""
    dtype: str = "float32"
    input_len: int = 64
    min_output_len: int = 64
    max_output_len: int = 320


@dataclass(frozen=True)
class Sides:
    """Both engines, running. `others`: the cores that neither decode engine uses."""

    cluster: Cluster
    solo: Program
    loaded_log: StepLogReader
    alone_log: StepLogReader
    cpus: list[int]
    others: list[int]


def measure_isolation(spec: IsolationSpec, *, say: Say) -> tuple[list[dict[str, Any]], dict[str, Ratio]]:
    """One row per bin (all rounds together), one for the whole, and the ratio with its interval over the rounds.

    Raises:
        BenchError: fewer than two cores, or a part did not start.
    """
    usable = len(os.sched_getaffinity(0))
    if usable < 2:
        raise TooFewCores(needed=2, usable=usable, what="--isolation (the decode engine has cores of its own)")
    with _running(spec, say) as sides:
        layout = _layout(sides)
        say(layout)
        say("warm-up: 64 streams, not measured")
        warm, _ = _run_loaded(sides, spec, seed=1000)
        low, high = batch_sizes(warm)
        _run_alone(sides, spec, low=low, high=high, seed=1000)
        say(f"batch sizes under load: {low} to {high} (25th to 95th percentile)")
        rounds: list[list[BinRatio]] = []
        loaded_steps: list[Step] = []
        alone_steps: list[Step] = []
        num_failed = 0
        for k in range(spec.num_rounds):
            if k % 2 == 0:
                loaded, failed = _run_loaded(sides, spec, seed=k)
                alone = _run_alone(sides, spec, low=low, high=high, seed=k)
            else:
                alone = _run_alone(sides, spec, low=low, high=high, seed=k)
                loaded, failed = _run_loaded(sides, spec, seed=k)
            rounds.append(match_bins(loaded, alone))
            loaded_steps += loaded
            alone_steps += alone
            num_failed += failed
            say(_round_line(k, spec.num_rounds, rounds[-1], loaded, alone))
    ones = [1.0] * len(rounds)
    ratios = {
        RATIO: paired_ratio([mean_ratio(bins) for bins in rounds], ones, goal=GOAL, at_most=True),
        CPU_RATIO: paired_ratio([mean_cpu_ratio(bins) for bins in rounds], ones),
    }
    common = {"layout": layout, "dtype": spec.dtype, "model": spec.model or "tiny-chat", "num_rounds": len(rounds)}
    total = {
        **common,
        "row": "all bins",
        "num_streams": NUM_STREAMS,
        "batch_sizes": [low, high],
        "num_failed_requests": num_failed,
        "num_loaded_steps": sum(step.is_pure_decode for step in loaded_steps),
        "num_alone_steps": sum(step.is_pure_decode for step in alone_steps),
        "num_compared_steps": sum(each.weight for bins in rounds for each in bins),
        "ratios_of_rounds": [mean_ratio(bins) for bins in rounds],
        "loaded_ms_p99_over_p50": _tail(loaded_steps),
        "alone_ms_p99_over_p50": _tail(alone_steps),
    }
    rows = [total, *({**common, "row": "bin", **_bin_row(each)} for each in match_bins(loaded_steps, alone_steps))]
    return rows, ratios


@contextmanager
def _running(spec: IsolationSpec, say: Say) -> Iterator[Sides]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="celeriac-isolation-")))
        env = {
            "CELERIAC_STEP_LOG": str(folder),
            "CELERIAC_DECODE__MAX_NUM_SEQS": str(MAX_NUM_SEQS),
            "CELERIAC_MODEL__DTYPE": spec.dtype,
            **({"CELERIAC_MODEL__PATH": str(Path(spec.model).absolute())} if spec.model else {}),
        }
        say("starting celeriac up --prefill 1 --decode 1")
        flags = ["--prefill", "1", "--decode", "1", "--set", "flower.enabled=false"]
        cluster = stack.enter_context(Cluster(folder / "run", flags, env=env))
        (decode_pid,) = engine_pids(cluster.status, "decode")
        cpus = allowed_cores(decode_pid)
        others = sorted(os.sched_getaffinity(0) - set(cpus))
        moved = pin_all_but(cluster.status, [decode_pid], others)
        say(f"decode engine on cores {cpus}; {moved} other processes of the cluster on {others}")
        stack.enter_context(pinned_self(others))
        incarnation = next(str(w["incarnation"]) for w in cluster.status["workers"] if w["role"] == "decode")
        solo_argv = [sys.executable, "-m", "engines.solo", "--jobs", "--cpus", ",".join(map(str, cpus))]
        say("starting engines.solo on the same cores")
        solo = stack.enter_context(Program("engines.solo", solo_argv, env=env))
        loaded_log = StepLogReader(folder / f"{incarnation}.steps")
        alone_log = StepLogReader(folder / "solo.steps")
        yield Sides(cluster, solo, loaded_log, alone_log, cpus, others)


def _run_loaded(sides: Sides, spec: IsolationSpec, *, seed: int) -> tuple[list[Step], int]:
    """Steps under 64 streams, closed loop, and how many requests failed."""
    lengths = Uniform(spec.min_output_len, spec.max_output_len)
    load = LoadSpec(float("inf"), Uniform(spec.input_len, spec.input_len), lengths, spec.num_requests, None, seed)
    run = asyncio.run(run_load(sides.cluster.url, load, concurrency_limit=NUM_STREAMS))
    return sides.loaded_log.read_new(), sum(bool(record.error) for record in run.records)


def _run_alone(sides: Sides, spec: IsolationSpec, *, low: int, high: int, seed: int) -> list[Step]:
    """Steps of the engine alone, over all batch sizes that the load has."""
    job = {
        "num_requests": spec.num_requests,
        "concurrency": max(high, 1),
        "min_concurrency": max(low, 1),
        "input_len": spec.input_len,
        "min_output_len": spec.min_output_len,
        "output_len": spec.max_output_len,
        "seed": seed,
    }
    sides.solo.run(job)
    return sides.alone_log.read_new()


def _layout(sides: Sides) -> str:
    cpus, others = (",".join(map(str, cores)) for cores in (sides.cpus, sides.others))
    return (
        f"loaded: {sides.cluster.layout}, {NUM_STREAMS} streams; decode engine on {cpus}, the rest and the client on "
        f"{others}. alone: engines.solo, engine on {cpus}, feeder on {others}"
    )


def _round_line(k: int, num_rounds: int, bins: list[BinRatio], loaded: list[Step], alone: list[Step]) -> str:
    num_compared = sum(each.weight for each in bins)
    return (
        f"round {k + 1} of {num_rounds}: ratio {mean_ratio(bins):.3f} "
        f"(CPU time {mean_cpu_ratio(bins):.3f}) over {num_compared} steps in {len(bins)} bins "
        f"({len(loaded)} loaded, {len(alone)} alone)"
    )


def _bin_row(each: BinRatio) -> dict[str, Any]:
    return {
        "num_seqs": each.bin.num_seqs,
        "context_bin": each.bin.context_bin,
        "num_loaded": each.num_loaded,
        "num_alone": each.num_alone,
        "loaded_ms": each.loaded_ms,
        "alone_ms": each.alone_ms,
        "loaded_cpu_ms": each.loaded_cpu_ms,
        "alone_cpu_ms": each.alone_cpu_ms,
        "ratio": each.loaded_ms / each.alone_ms,
    }


def _tail(steps: list[Step]) -> float:
    """How much longer a rare step is: p99 over p50 of milliseconds per sequence and step."""
    times = [step.step_ms / step.num_seqs for step in steps if step.is_pure_decode]
    return percentile(times, 0.99) / percentile(times, 0.5) if times else float("nan")
