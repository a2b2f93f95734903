"""Speculation on against off: the same engine twice, the same prompts one at a time, interleaved round by round.

repetitive    a passage four times over: what comes next has been there before
plain         tiny-chat: its gate's prompts; a shape with random weights: random ids
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.engine_program import ROOT, Program
from benchmarks.engine_shapes import SHAPES, Shape
from benchmarks.engine_solo import solo_program
from benchmarks.engine_speed import model_folder
from benchmarks.stats import Ratio, paired_ratio, percentile

NUM_PROMPTS: Final = 6
PASSAGE_TOKENS: Final = 40
NUM_REPEATS: Final = 4
OFF, ON = "off", "ngram"
Say = Callable[[str], None]


@dataclass(frozen=True)
class SpeculationSpec:
    """`output_len` tokens per prompt, greedy, in `dtype`."""

    shapes: tuple[str, ...]
    num_rounds: int
    dtype: str
    cpus: tuple[int, ...]
    output_len: int


def measure_speculation(spec: SpeculationSpec, *, say: Say) -> tuple[list[dict[str, Any]], dict[str, Ratio]]:
    """A row per shape and kind of prompt; ratios of its seconds without speculation over those with it.

    Raises:
        BenchError: an engine failed.
    """
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    for name in spec.shapes:
        with ExitStack() as stack:
            model = stack.enter_context(model_folder(SHAPES[name], say))
            say(f"{name}: starting two engines")
            engines = {
                mode: stack.enter_context(
                    solo_program(model, spec.cpus, spec.dtype, env={"CELERIAC_ENGINE__SPECULATION": mode})
                )
                for mode in (OFF, ON)
            }
            for kind, prompts in _prompts(SHAPES[name]).items():
                row, ratio = _compare(spec, engines, prompts)
                say(f"{name} {kind}: {spec.num_rounds} rounds")
                rows.append({"shape": name, "prompts": kind, **row})
                ratios[f"speculation_{kind}_{name}"] = ratio
    return rows, ratios


def _compare(
    spec: SpeculationSpec, engines: dict[str, Program], prompts: list[list[int]]
) -> tuple[dict[str, Any], Ratio]:
    job = {
        "num_requests": len(prompts),
        "concurrency": 1,
        "input_len": 0,
        "output_len": spec.output_len,
        "prompts": prompts,
        "wants_ids": True,
        "wants_counters": True,
    }
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in engines}
    for k in range(spec.num_rounds + 1):  # the first is a warm-up
        for mode in (OFF, ON) if k % 2 else (ON, OFF):
            runs[mode].append(engines[mode].run(job))
    seconds = {mode: [float(run["seconds"]) for run in runs[mode][1:]] for mode in engines}
    drafted, kept, steps = (
        float(runs[ON][-1]["counters"][counter] - runs[ON][0]["counters"][counter])
        for counter in ("draft_tokens", "kept_draft_tokens", "steps")
    )
    num_tokens = sum(int(run["num_tokens"]) for run in runs[ON][1:])
    pairs = zip(runs[ON][-1]["token_ids"], runs[OFF][-1]["token_ids"], strict=True)
    row = {
        "dtype": spec.dtype,
        "num_threads": len(spec.cpus),
        "num_rounds": spec.num_rounds,
        "num_prompts": len(prompts),
        "output_len": spec.output_len,
        "off_tokens_per_s": num_tokens / spec.num_rounds / percentile(seconds[OFF], 0.5),
        "on_tokens_per_s": num_tokens / spec.num_rounds / percentile(seconds[ON], 0.5),
        "tokens_per_step": num_tokens / steps,
        "draft_tokens": drafted,
        "acceptance": kept / drafted if drafted else float("nan"),
        "num_differing": sum(ours != theirs for ours, theirs in pairs),
    }
    return row, paired_ratio(seconds[OFF], seconds[ON])


def _prompts(shape: Shape) -> dict[str, list[list[int]]]:
    rng = random.Random(5)
    if shape.folder:
        lines = (ROOT / shape.folder / "prompts.jsonl").read_text().splitlines()
        plain = [list(map(int, json.loads(line)["prompt_ids"])) for line in lines[:: len(lines) // NUM_PROMPTS]]
    else:
        plain = [rng.choices(range(3, 1000), k=PASSAGE_TOKENS * NUM_REPEATS) for _ in range(NUM_PROMPTS)]
    passages = [rng.choices(range(3, 1000), k=PASSAGE_TOKENS) for _ in range(NUM_PROMPTS)]
    return {"repetitive": [ids * NUM_REPEATS for ids in passages], "plain": plain[:NUM_PROMPTS]}
