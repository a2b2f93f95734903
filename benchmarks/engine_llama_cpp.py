"""llama.cpp in a venv of its own, as a rival of `celeriac bench engine --compare llama.cpp`.

`llama-cpp-python` carries llama.cpp's source and is compiled for this very CPU: needs g++ and CMake, 5 to 15 minutes
on two cores, once. It is driven through its C API, in one process and without HTTP, like the other programs. The GGUF
file is made on the spot from the same checkpoint, in the dtype of the run, not quantised.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.engine_program import ROOT, Program
from benchmarks.engine_venv import RivalVenv, pip_install

NAME: Final = "llama.cpp"
BINDING: Final = "llama-cpp-python==0.3.36"
ADDED: Final = ("gguf==0.19.0",)
_CMAKE_ARGS: Final = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_SERVER=OFF"


def llama_cpp_program(python: Path, model: Path, cpus: Sequence[int], dtype: str) -> Program:
    """One thread on each of `cpus`. Its threads spin between jobs, so it is stopped there."""
    argv = [str(python), "-P", str(ROOT / "benchmarks" / "engine_llama_cpp_runner.py"), "--model", str(model)]
    argv += ["--dtype", dtype, "--cpus", ",".join(map(str, cpus))]
    return Program(NAME, argv, env={"OMP_NUM_THREADS": str(len(cpus))}, is_stopped_when_idle=True)


def _install(python: Path) -> None:
    pip_install(NAME, python, *ADDED)
    pip_install(NAME, python, "--no-binary", "llama-cpp-python", BINDING, env={"CMAKE_ARGS": _CMAKE_ARGS})


VENV: Final = RivalVenv("llama-cpp", (BINDING, *ADDED), 1 << 30, _install)
