"""The kernels as Python sees them: one `Kernels` per dtype, its functions called through ctypes (the GIL is released).

The library links to the OpenMP runtime that torch has already loaded, so both share one pool of threads.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Final

import torch

from engines.errors import KernelsUnavailable
from engines.ext.build import load_library

logger = logging.getLogger(__name__)

HEAD_DIMS: Final = frozenset({16, 32, 64, 80, 96, 128})  # as in cpp/attention.h
_DTYPES: Final = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

# Argument types, as in kernels.cpp. Declared, so that no 64-bit address is cut to an int.
_STEP: Final = [c_void_p, c_int64, c_int64]
_SIGNATURES: Final[dict[str, tuple[type[c_int] | type[c_int64] | None, list[type]]]] = {
    "attend": (c_int, [*_STEP, c_void_p, c_int64, c_void_p]),
    "write_kv": (None, [*_STEP, c_void_p, c_int64, c_void_p, c_int64]),
    "norm": (
        None,
        [c_int64, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_float, c_void_p, c_int64, c_int64],
    ),
    "silu_mul": (None, [c_int64, c_int64, c_void_p, c_void_p, c_int64]),
    "packed_size": (c_int64, [c_int64, c_int64]),
    "pack_weight": (None, [c_void_p, c_int64, c_int64, c_void_p, c_int64]),
    "linear": (None, [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64]),
    "linear_wide": (None, [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64]),
    "run_layers": (c_int, [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p]),
    "run_head": (None, [c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64]),
    "rotate": (None, [c_int64, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64]),
}
_FIND_PEAKS: Final[list[type]] = [c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int64]


class Kernels:
    """The functions for one dtype. Pointers are not checked: only the classes that wrap them call these."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.attend = _function(library, "attend", dtype)
        self.write_kv = _function(library, "write_kv", dtype)
        self.norm = _function(library, "norm", dtype)
        self.silu_mul = _function(library, "silu_mul", dtype)
        self.rotate = _function(library, "rotate", dtype)
        self.run_layers = _function(library, "run_layers", dtype)
        self.run_head = _function(library, "run_head", dtype)
        self.find_peaks = library.find_peaks  # of fp32 logits, whatever the dtype of the model
        self.find_peaks.restype, self.find_peaks.argtypes = None, _FIND_PEAKS
        library.head_group.restype, library.head_group.argtypes = c_int64, []
        self.head_group = int(library.head_group())
        self.find_amx, self.try_amx = library.find_amx, library.try_amx
        self.amx_equals_emulation, self.has_emulated_tiles = library.amx_equals_emulation, library.has_emulated_tiles
        for asked in (self.find_amx, self.try_amx, self.amx_equals_emulation, self.has_emulated_tiles):
            asked.restype, asked.argtypes = c_int64, []
        self.packed_size = _function(library, "packed_size", dtype)
        self.pack_weight = _function(library, "pack_weight", dtype)
        self.linear = _function(library, "linear", dtype)
        self.linear_wide = _function(library, "linear_wide", dtype)


def load_kernels(dtype: torch.dtype) -> Kernels:
    """Build them if need be and load them. Blocks for some seconds the first time on a machine.

    Raises:
        KernelsUnavailable: no compiler, a failed build, or a dtype without kernels.
    """
    if dtype not in _DTYPES:
        raise KernelsUnavailable(why=f"there are none for {dtype}", hint="Expected float32 or bfloat16.")
    return Kernels(load_library(), dtype)


def find_kernels(asked: str, *, dtype: torch.dtype, device: str) -> Kernels | None:
    """Kernels for the setting `engine.kernels` (auto, torch, native); None: torch does everything.

    Raises:
        KernelsUnavailable: `native` was asked for by name and cannot be had.
    """
    if asked == "torch" or (asked == "auto" and device != "cpu"):
        return None
    if device != "cpu":
        raise KernelsUnavailable(
            why=f"they compute on CPUs, and the device is {device}", hint="Set `engine.kernels: auto`."
        )
    try:
        return load_kernels(dtype)
    except KernelsUnavailable as error:
        if asked == "native":
            raise
        logger.warning("%s Attention, norms and rotation run on torch, slower.", error)
        return None


def _function(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
    function = library[f"{name}_{_DTYPES[dtype]}"]
    function.restype, function.argtypes = _SIGNATURES[name]
    return function
