"""Where a step's time goes, by the engine's own timers (engines/step_timer.py), in the terms of the glossary."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from benchmarks.engine_cases import Case
from benchmarks.engine_shapes import SHAPES, Shape
from benchmarks.engine_solo import solo_program
from benchmarks.engine_speed import SpeedSpec, model_folder
from benchmarks.stats import Ratio, paired_ratio, percentile

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


def measure_profile(spec: SpeedSpec, *, say: Callable[[str], None]) -> tuple[list[dict[str, Any]], dict[str, Ratio]]:
    """A row per shape and case: medians over the steps of the case. Of decode at batch 32 also the milliseconds outside
    the forward pass, with the interval over the rounds, against the goal of 1 ms.

    Raises:
        BenchError: the engine failed.
    """
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    for name in spec.shapes:
        rounds = _run_rounds(spec, SHAPES[name], say)
        for case in spec.chosen_cases():
            rows.append(_row(spec, SHAPES[name], case, [step for steps in rounds for step in steps]))
            if case.name == OVERHEAD_CASE:
                medians = [percentile([overhead_ms(step) for step in _of_case(case, steps)], 0.5) for steps in rounds]
                ratios[f"step_outside_forward_b32_{name}_ms"] = paired_ratio(
                    medians, [1.0] * len(medians), goal=OVERHEAD_GOAL_MS, at_most=True
                )
    return rows, ratios


def overhead_ms(step: dict[str, Any]) -> float:
    """All of a step, and what lies between it and the step before, that is not the forward pass."""
    return sum(float(ms) for part, ms in step["parts_ms"].items() if part not in FORWARD_PARTS)


def _run_rounds(spec: SpeedSpec, shape: Shape, say: Callable[[str], None]) -> list[list[dict[str, Any]]]:
    """The steps of each round. A round before them is a warm-up."""
    rounds: list[list[dict[str, Any]]] = []
    with tempfile.TemporaryDirectory(prefix="celeriac-profile-") as logs, model_folder(shape, say) as model:
        say(f"{shape.name}: starting the engine")
        log, num_seen = Path(logs, "solo.parts"), 0
        with solo_program(model, spec.cpus, spec.dtype, env={"CELERIAC_STEP_PROFILE": logs}) as engine:
            for k in range(spec.num_rounds + 1):
                for number, case in enumerate(spec.chosen_cases()):
                    case.measure(engine.run, decode_tokens=spec.decode_tokens, seed=1000 * k + number)
                say(f"{shape.name}: " + (f"round {k} of {spec.num_rounds}" if k else "warm-up"))
                steps = _steps(log)
                rounds.append(steps[num_seen:])
                num_seen = len(steps)
    return rounds[1:]


def _of_case(case: Case, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    num_tokens = case.num_seqs if case.phase == "decode" else case.num_seqs * case.input_len
    return [step for step in steps if (step["num_seqs"], step["num_tokens"]) == (case.num_seqs, num_tokens)]


def _row(spec: SpeedSpec, shape: Shape, case: Case, steps: list[dict[str, Any]]) -> dict[str, Any]:
    chosen = _of_case(case, steps)
    overheads = [overhead_ms(step) for step in chosen]
    return {
        "shape": shape.name,
        "case": case.name,
        "dtype": spec.dtype,
        "num_threads": len(spec.cpus),
        "num_steps": len(chosen),
        "step_ms": percentile([step["step_ms"] for step in chosen], 0.5),
        "parts_ms": {part: percentile([step["parts_ms"].get(part, 0.0) for step in chosen], 0.5) for part in PARTS},
        "outside_forward_ms": {"p50": percentile(overheads, 0.5), "p90": percentile(overheads, 0.9)},
    }


def _steps(log: Path) -> list[dict[str, Any]]:
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
