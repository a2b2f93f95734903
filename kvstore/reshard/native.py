"""The C++ of compression: many rows in one call, the GIL released. None where there is no compiler: then numpy does it.

Its bytes are those of `compress.py`, so a worker with a compiler and one without understand each other.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import NativeUnavailable
from kvstore.native import Sources, load_library

logger = logging.getLogger(__name__)

SOURCES: Final = Sources(
    folder=Path(__file__).parent / "cpp",
    main="compress.cpp",
    # -ffp-contract=off: a multiplication and what follows must not become one operation.
    flags=("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC"),
)
_DTYPES: Final = {"bfloat16": 0, "float16": 1, "float32": 2}


class NativeRows:
    """Rows of `dim` values; all arrays are contiguous. False: not for these, and nothing was done."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._compress, self._expand = library.compress_rows, library.expand_rows
        self._compress.argtypes = [c_void_p, c_int, c_int64, c_int64, c_float, c_void_p, c_void_p, c_void_p]
        self._expand.argtypes = [c_void_p, c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p]
        self._compress.restype = self._expand.restype = c_int

    def compress(
        self, words: NDArray[Any], dtype: str, inverse: float, table: NDArray[np.uint8] | None, out: NDArray[np.uint8]
    ) -> bool:
        """Scales, then values, into `out`; `inverse`: what the largest magnitude of a row is multiplied by."""
        dim = words.shape[-1]
        rows = words.size // dim
        scales, codes = out.ctypes.data, out.ctypes.data + 4 * rows
        tables = None if table is None else table.ctypes.data
        failed: int = self._compress(words.ctypes.data, _DTYPES[dtype], rows, dim, inverse, tables, scales, codes)
        return not failed

    def expand(
        self, packed: NDArray[np.uint8], dtype: str, table: NDArray[np.float32] | None, out: NDArray[Any]
    ) -> bool:
        """What `compress` made, as words of `dtype` in the shape of `out`."""
        dim = out.shape[-1]
        rows = out.size // dim
        scales, codes = packed.ctypes.data, packed.ctypes.data + 4 * rows
        tables = None if table is None else table.ctypes.data
        failed: int = self._expand(scales, codes, _DTYPES[dtype], rows, dim, tables, out.ctypes.data)
        return not failed


@cache
def native_rows() -> NativeRows | None:
    """Compiles at first use on a machine: some seconds. A node asks before it has links."""
    try:
        return NativeRows(load_library(SOURCES))
    except NativeUnavailable as error:
        logger.warning("%s KV is compressed in Python, slower.", error)
        return None
