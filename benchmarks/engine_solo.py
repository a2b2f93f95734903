"""Our engine alone as a program of `celeriac bench engine`: one process, fed by `engines.solo`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.engine_cases import MAX_NUM_BATCHED_TOKENS
from benchmarks.engine_program import JOB_TIMEOUT_S, Program

OURS: Final = "celeriac"


def solo_program(
    model: Path,
    cpus: Sequence[int],
    dtype: str,
    *,
    env: dict[str, str] | None = None,
    name: str = OURS,
    device: str = "cpu",
) -> Program:
    """One engine with `cpus`. `env`: more variables. `device`: cpu or cuda."""
    argv = [sys.executable, "-m", "engines.solo", "--jobs", "--cpus", ",".join(map(str, cpus))]
    argv += ["--timeout-s", str(JOB_TIMEOUT_S)]
    settings = {
        "CELERIAC_MODEL__PATH": str(model),
        "CELERIAC_MODEL__DTYPE": dtype,
        "CELERIAC_DECODE__DEVICE": device,
        "CELERIAC_DECODE__MAX_NUM_BATCHED_TOKENS": str(MAX_NUM_BATCHED_TOKENS),
    }
    return Program(name, argv, env={**settings, **(env or {})})


def quantized_program(quantization: str, model: Path, cpus: Sequence[int], dtype: str) -> Program:
    """The same engine with `engine.quantization` (int8, int4), to be compared with the one without."""
    return solo_program(model, cpus, dtype, env={"CELERIAC_ENGINE__QUANTIZATION": quantization}, name=quantization)
