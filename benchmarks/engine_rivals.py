"""The programs that `celeriac bench engine --compare` knows, by name: other engines, and our own with other weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import engine_llama_cpp, engine_transformers, engine_vllm
from benchmarks.engine_program import Program
from benchmarks.engine_solo import quantized_program

Say = Callable[[str], None]
MakeRival = Callable[[Path, Sequence[int], str], Program]  # model folder, cores, dtype


@dataclass(frozen=True)
class RivalOptions:
    """`venvs`: where the venvs of rivals are or will be, by rival; the cache for others. `is_vllm_eager`: without
    torch.compile."""

    venvs: dict[str, Path]
    is_vllm_eager: bool = False


def _vllm(options: RivalOptions, say: Say) -> MakeRival:
    python = engine_vllm.VENV.ensure(options.venvs.get(engine_vllm.NAME), say=say)
    return functools.partial(engine_vllm.vllm_program, python, eager=options.is_vllm_eager)


def _transformers(_: RivalOptions, __: Say) -> MakeRival:
    return engine_transformers.transformers_program


def _llama_cpp(options: RivalOptions, say: Say) -> MakeRival:
    python = engine_llama_cpp.VENV.ensure(options.venvs.get(engine_llama_cpp.NAME), say=say)
    return functools.partial(engine_llama_cpp.llama_cpp_program, python)


def _int8(_: RivalOptions, __: Say) -> MakeRival:
    return functools.partial(quantized_program, "int8")


def _int4(_: RivalOptions, __: Say) -> MakeRival:
    return functools.partial(quantized_program, "int4")


# Each makes what it needs (a venv) and gives the function that starts it on a model; raises ProgramFailed.
RIVALS: Final[dict[str, Callable[[RivalOptions, Say], MakeRival]]] = {
    engine_vllm.NAME: _vllm,
    engine_transformers.NAME: _transformers,
    engine_llama_cpp.NAME: _llama_cpp,
    "int8": _int8,
    "int4": _int4,
}
