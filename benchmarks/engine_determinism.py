"""How often tokens depend on who shares the step, and what it costs that they do not.

An engine with `engine.deterministic`, one without, and one without on oneDNN's linears, whose rows do depend on the
batch, generate the same prompts twice: one at a time, and many together. Prefix caching is off, so the second time
computes everything again. Then the speeds of the first two are compared case by case, interleaved.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.engine_cases import Case
from benchmarks.engine_program import Program
from benchmarks.engine_progress import RoundClock
from benchmarks.engine_rivals import Say
from benchmarks.engine_shapes import SHAPES, Shape
from benchmarks.engine_solo import solo_program
from benchmarks.engine_speed import SpeedSpec, model_folder, turned
from benchmarks.stats import Ratio, paired_ratio, percentile

COST_GOAL: Final = 1.03  # at or below it, determinism would be the default
NUM_PROMPTS: Final = 64
BATCH: Final = 16
INPUT_LEN: Final = 96
OUTPUT_LEN: Final = 128
SEED: Final = 4242


@dataclass(frozen=True)
class Variant:
    """Of an engine's settings. `is_timed`: it takes part in the comparison of speeds."""

    name: str
    env: dict[str, str]
    is_deterministic: bool = False
    is_timed: bool = False


VARIANTS: Final = (
    Variant("as set", {"CELERIAC_ENGINE__DETERMINISTIC": "false"}, is_timed=True),
    Variant("onednn linears", {"CELERIAC_ENGINE__DETERMINISTIC": "false", "CELERIAC_ENGINE__LINEAR": "onednn"}),
    Variant("deterministic", {"CELERIAC_ENGINE__DETERMINISTIC": "true"}, is_deterministic=True, is_timed=True),
)


def measure_determinism(
    spec: SpeedSpec, *, say: Say, num_prompts: int = NUM_PROMPTS, output_len: int = OUTPUT_LEN
) -> tuple[list[dict[str, Any]], dict[str, Ratio]]:
    """A row per shape and variant: how many prompts got other tokens in a batch. Ratios: the cost of determinism.

    Raises:
        BenchError: an engine failed, or cannot be deterministic here.
    """
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    for name in spec.shapes:
        shape = SHAPES[name]
        with model_folder(shape, say) as model:
            engines: dict[bool, Program] = {}
            with ExitStack() as stack:
                for variant in VARIANTS:
                    with ExitStack() as own:
                        env = {**variant.env, "CELERIAC_KV__ENABLE_PREFIX_CACHING": "false"}
                        say(f"{name}: {num_prompts} prompts alone, then {BATCH} together, {variant.name}")
                        engine = own.enter_context(solo_program(model, spec.cpus, spec.dtype, env=env))
                        alone = _tokens(engine, 1, num_prompts, output_len)
                        together = _tokens(engine, BATCH, num_prompts, output_len)
                        rows.append({**_row(alone, together), **_common(spec, shape, variant, output_len)})
                        if variant.is_timed:
                            engines[variant.is_deterministic] = engine
                            stack.enter_context(own.pop_all())
                ratios.update(_costs(spec, shape, engines, say))
    return rows, ratios


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token that differs.

    >>> first_difference([1, 2, 3], [1, 5, 3]), first_difference([1], [1])
    (1, None)
    """
    return next((k for k, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), None)


def _tokens(engine: Program, concurrency: int, num_prompts: int, output_len: int) -> list[list[int]]:
    job = {"num_requests": num_prompts, "concurrency": concurrency, "input_len": INPUT_LEN, "output_len": output_len}
    ids: list[list[int]] = engine.run({**job, "seed": SEED, "wants_ids": True})["token_ids"]
    return ids


def _row(alone: list[list[int]], together: list[list[int]]) -> dict[str, Any]:
    found = [first_difference(a, b) for a, b in zip(alone, together, strict=True)]
    places = [float(place) for place in found if place is not None]
    return {
        "num_prompts": len(found),
        "num_differing": len(places),
        "first_difference": {"p10": percentile(places, 0.1), "p50": percentile(places, 0.5)},
    }


def _common(spec: SpeedSpec, shape: Shape, variant: Variant, output_len: int) -> dict[str, Any]:
    return {
        "shape": shape.name,
        "variant": variant.name,
        "is_deterministic": variant.is_deterministic,
        "dtype": spec.dtype,
        "num_threads": len(spec.cpus),
        "batch": BATCH,
        "output_len": output_len,
    }


def _costs(spec: SpeedSpec, shape: Shape, engines: dict[bool, Program], say: Say) -> dict[str, Ratio]:
    cases = spec.chosen_cases()
    speeds: dict[str, dict[bool, list[float]]] = {case.name: {False: [], True: []} for case in cases}
    clock = RoundClock(shape.name, num_rounds=spec.num_rounds, num_parts=len(cases))
    for k in range(-1, spec.num_rounds):  # round -1 is a warm-up
        for number, case in enumerate(cases):
            found = _speeds(case, engines, turn=k + number, spec=spec, seed=1000 * (k + 2) + number)
            if k >= 0:
                for is_on, speed in found.items():
                    speeds[case.name][is_on].append(speed)
            line = f"{case.name}: {found[True]:.1f} tokens/s deterministic, {found[False]:.1f} not"
            say(clock.line(k, number, line))
    return {
        f"{name}_{shape.name}_deterministic_cost": paired_ratio(each[False], each[True], goal=COST_GOAL, at_most=True)
        for name, each in speeds.items()
    }


def _speeds(case: Case, engines: dict[bool, Program], *, turn: int, spec: SpeedSpec, seed: int) -> dict[bool, float]:
    return {
        engine is engines[True]: case.measure(engine.run, decode_tokens=spec.decode_tokens, seed=seed)
        for engine in turned(list(engines.values()), turn)
    }
