"""The AMX instructions themselves on a CPU without AMX, each trapped and done as documented (cpp/trap.cpp).

    python -m tests.amx.trapped FOLDER        in a process of its own: it handles SIGILL. FOLDER: a checkpoint

Prints JSON: {"instructions": how many were trapped, and for each check whether it held}.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from ctypes import c_int64
from pathlib import Path
from typing import Final
from unittest import mock

import torch
from torch import Tensor

from engines.ext.library import load_kernels
from engines.factory import build_engine_model
from engines.linear import choose
from engines.linear.amx import Tiles
from engines.linear.native_linear import NativeBackend
from engines.models.llama import LlamaModel
from kvstore import native
from tests.unit.engines.test_native_stack import run

TRAP: Final = native.Sources(
    folder=Path(__file__).parent / "cpp",
    main="trap.cpp",
    flags=("-std=c++20", "-O2", "-march=native", "-shared", "-fPIC"),
)
SHAPES: Final = ((70, 97), (32, 64), (5, 33), (96, 1))  # (out, in)


def main(folder: Path) -> dict[str, int | bool]:
    trap = ctypes.CDLL(str(native.build_library(TRAP)))
    trap.count_trapped.restype = c_int64
    trap.add_in_other_order.argtypes = [c_int64]
    assert trap.install_trap() == 0
    kernels = load_kernels(torch.bfloat16)
    checks = {"self_check": kernels.amx_equals_emulation() == 1}
    trap.add_in_other_order(1)
    checks["self_check_sees_another_order"] = kernels.amx_equals_emulation() == 0
    trap.add_in_other_order(0)
    checks["linears"] = all(_linears_are_equal(*shape) for shape in SHAPES)
    checks["self_check_in_a_child"] = _holds_in_a_child(lambda: kernels.amx_equals_emulation() == 1)
    logits, kv = _stack(folder, Tiles.AMX)
    logits_emulated, kv_emulated = _stack(folder, Tiles.EMULATED)
    checks["stack"] = torch.equal(logits, logits_emulated) and torch.equal(kv, kv_emulated)
    return {"instructions": trap.count_trapped(), **checks}


def _holds_in_a_child(check: Callable[[], bool]) -> bool:
    """Forked as cpp/amx_check.h forks: OpenMP's threads stay behind."""
    child = os.fork()
    if child == 0:
        os._exit(0 if check() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _linears_are_equal(num_out: int, num_in: int) -> bool:
    weight, bias, x = (torch.randn(*shape).bfloat16() for shape in ((num_out, num_in), (num_out,), (40, num_in)))
    real, emulated = (
        NativeBackend(load_kernels(torch.bfloat16), tiles=tiles).make(weight, bias)
        for tiles in (Tiles.AMX, Tiles.EMULATED)
    )
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for num_rows in (1, 2, 15, 16, 17, 31, 32, 33, 40):
            if not torch.equal(real.wide(x[:num_rows]), emulated.wide(x[:num_rows])):
                return False
    return True


def _stack(folder: Path, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Logits and KV of some steps, all layers in one call, on two threads."""
    torch.set_num_threads(2)
    with torch.inference_mode(), mock.patch.object(choose, "find_tiles", lambda _: tiles):
        model, _ = build_engine_model(folder, dtype=torch.bfloat16, linear="native", kernels="native")
        assert isinstance(model, LlamaModel) and model.stack is not None
        return run(model, [], group=2)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
