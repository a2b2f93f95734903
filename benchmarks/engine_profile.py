"""Where a step's time goes, by the engine's own timers (engines/step_timer.py), in the terms of the glossary."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

from benchmarks.engine_cases import Case, RunJob
from benchmarks.engine_shapes import SHAPES, Shape
from benchmarks.engine_solo import solo_program
from benchmarks.engine_speed import SpeedSpec, model_folder
from benchmarks.stats import Ratio, paired_ratio, percentile

Step = dict[str, Any]
PARTS: Final = {
    "poll": "look for messages and KV events",
    "front_messages": "messages of the front",
    "kv_events": "events of the KV node",
    "schedule": "who runs in this step",
    "metadata": "begin_step: ids, positions, slot mapping, block tables",
    "forward": "the model, layer by layer, with attention and KV writes",
    "logits": "the head",
    "sample": "checks, penalties, choice of the token",
    "complete": "the scheduler takes the tokens",
    "send": "tokens to the front",
    "other": "grants, stats, finish rules",
}
FORWARD_PARTS: Final = ("forward", "logits")
OVERHEAD_CASE: Final = "decode_b32"
OVERHEAD_GOAL_MS: Final = 1.0
# How tokens are chosen: parameters of the requests. `random` is what model cards ask for, `open` has no filter at all.
SAMPLINGS: Final[dict[str, dict[str, float]]] = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "nucleus": {"temperature": 0.7, "top_p": 0.95},
    "open": {"temperature": 1.0},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
}


def measure_profile(
    spec: SpeedSpec, *, say: Callable[[str], None], samplings: Sequence[str] = ("greedy",)
) -> tuple[list[dict[str, Any]], dict[str, Ratio]]:
    """A row per shape, case and way to choose tokens: medians over the steps of the case. Of decode at batch 32 also
    the milliseconds outside the forward pass, with the interval over the rounds, against the goal of 1 ms.

    Raises:
        BenchError: the engine failed.
    """
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    for name in spec.shapes:
        rounds = _run_rounds(spec, SHAPES[name], samplings, say)
        for case, sampling in product(spec.chosen_cases(), samplings):
            of_rounds = [_of_case(case, steps[case.name, sampling]) for steps in rounds]
            rows.append(_row(spec, SHAPES[name], case, sampling, [step for steps in of_rounds for step in steps]))
            if case.name == OVERHEAD_CASE:
                medians = [percentile([overhead_ms(step) for step in steps], 0.5) for steps in of_rounds]
                way = "" if sampling == "greedy" else f"_{sampling}"
                ratios[f"step_outside_forward_b32_{name}{way}_ms"] = paired_ratio(
                    medians, [1.0] * len(medians), goal=OVERHEAD_GOAL_MS, at_most=True
                )
    return rows, ratios


def overhead_ms(step: Step, times: str = "parts_ms") -> float:
    """All of a step, and what lies between it and the step before, that is not the forward pass.

    `times`: "parts_ms", the time that passed, or "cpu_ms", that of the engine thread.
    """
    return sum(float(ms) for part, ms in step[times].items() if part not in FORWARD_PARTS)


def _run_rounds(
    spec: SpeedSpec, shape: Shape, samplings: Sequence[str], say: Callable[[str], None]
) -> list[dict[tuple[str, str], list[Step]]]:
    """The steps of each round by case and sampling. A round before them is a warm-up."""
    rounds: list[dict[tuple[str, str], list[Step]]] = []
    with tempfile.TemporaryDirectory(prefix="celeriac-profile-") as logs, model_folder(shape, say) as model:
        say(f"{shape.name}: starting the engine")
        log, num_seen = Path(logs, "solo.parts"), 0
        with solo_program(model, spec.cpus, spec.dtype, env={"CELERIAC_STEP_PROFILE": logs}) as engine:
            for k in range(spec.num_rounds + 1):
                found: dict[tuple[str, str], list[Step]] = {}
                for number, (case, sampling) in enumerate(product(spec.chosen_cases(), samplings)):
                    run = partial(_run_with, engine.run, SAMPLINGS[sampling])
                    case.measure(run, decode_tokens=spec.decode_tokens, seed=1000 * k + number)
                    steps = _steps(log)
                    found[case.name, sampling], num_seen = steps[num_seen:], len(steps)
                say(f"{shape.name}: " + (f"round {k} of {spec.num_rounds}" if k else "warm-up"))
                rounds.append(found)
    return rounds[1:]


def _run_with(run: RunJob, params: dict[str, float], job: dict[str, Any]) -> dict[str, float]:
    return run({**job, "params": params})


def _of_case(case: Case, steps: list[Step]) -> list[Step]:
    num_tokens = case.num_seqs if case.phase == "decode" else case.num_seqs * case.input_len
    return [step for step in steps if (step["num_seqs"], step["num_tokens"]) == (case.num_seqs, num_tokens)]


def _row(spec: SpeedSpec, shape: Shape, case: Case, sampling: str, steps: list[Step]) -> dict[str, Any]:
    overheads = [overhead_ms(step) for step in steps]
    return {
        "shape": shape.name,
        "case": case.name,
        "sampling": sampling,
        "dtype": spec.dtype,
        "num_threads": len(spec.cpus),
        "num_steps": len(steps),
        "step_ms": percentile([step["step_ms"] for step in steps], 0.5),
        "parts_ms": {part: percentile([step["parts_ms"].get(part, 0.0) for step in steps], 0.5) for part in PARTS},
        "cpu_ms": {part: percentile([step["cpu_ms"].get(part, 0.0) for step in steps], 0.5) for part in PARTS},
        "outside_forward_cpu_ms": percentile([overhead_ms(step, "cpu_ms") for step in steps], 0.5),
        "outside_forward_ms": {"p50": percentile(overheads, 0.5), "p90": percentile(overheads, 0.9)},
    }


def _steps(log: Path) -> list[Step]:
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
