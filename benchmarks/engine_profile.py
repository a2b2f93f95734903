"""Where a step's time goes, by the engine's own timers (engines/step_timer.py), in the terms of the glossary."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from benchmarks.engine_cases import Case
from benchmarks.engine_shapes import SHAPES
from benchmarks.engine_speed import SpeedSpec, model_folder, solo_program
from benchmarks.stats import percentile

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


def measure_profile(spec: SpeedSpec, *, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row per shape and case: medians over the steps of the case.

    Raises:
        BenchError: the engine failed.
    """
    rows: list[dict[str, Any]] = []
    for name in spec.shapes:
        shape = SHAPES[name]
        with tempfile.TemporaryDirectory(prefix="celeriac-profile-") as logs, model_folder(shape, say) as model:
            say(f"{name}: starting the engine")
            log = Path(logs, "solo.parts")
            env = {"CELERIAC_STEP_PROFILE": logs}
            with solo_program(model, spec.cpus, spec.dtype, env=env) as engine:
                for k in range(spec.num_rounds + 1):  # the first round is a warm-up
                    for number, case in enumerate(spec.chosen_cases()):
                        case.measure(engine.run, decode_tokens=spec.decode_tokens, seed=1000 * k + number)
                    say(f"{name}: " + (f"round {k} of {spec.num_rounds}" if k else "warm-up"))
                    if k == 0:
                        num_warm_up = len(_steps(log))
            steps = _steps(log)[num_warm_up:]
        rows += [_row(replace(spec, shapes=(name,)), case, steps) for case in spec.chosen_cases()]
    return rows


def overhead_ms(step: dict[str, Any]) -> float:
    """All of a step, and what lies between it and the step before, that is not the forward pass."""
    return sum(float(ms) for part, ms in step["parts_ms"].items() if part not in FORWARD_PARTS)


def _row(spec: SpeedSpec, case: Case, steps: list[dict[str, Any]]) -> dict[str, Any]:
    num_tokens = case.num_seqs if case.phase == "decode" else case.num_seqs * case.input_len
    chosen = [step for step in steps if (step["num_seqs"], step["num_tokens"]) == (case.num_seqs, num_tokens)]
    overheads = [overhead_ms(step) for step in chosen]
    return {
        "shape": spec.shapes[0],
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
