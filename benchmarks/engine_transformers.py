"""transformers' own `generate` with its DynamicCache, as a rival of `celeriac bench engine --compare transformers`.

It runs with this Python: transformers is one of the engine's dependencies.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.engine_program import ROOT, Program

NAME: Final = "transformers"


def transformers_program(model: Path, cpus: Sequence[int], dtype: str) -> Program:
    """One thread on each of `cpus`."""
    argv = [sys.executable, "-P", str(ROOT / "benchmarks" / "engine_transformers_runner.py"), "--model", str(model)]
    argv += ["--dtype", dtype, "--cpus", ",".join(map(str, cpus))]
    return Program(NAME, argv, env={"OMP_NUM_THREADS": str(len(cpus)), "HF_HUB_OFFLINE": "1"})
