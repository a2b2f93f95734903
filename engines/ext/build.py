"""Where the kernels' sources are and how they are compiled; `kvstore.native` builds and caches them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from engines.errors import KernelsUnavailable
from kvstore import native
from kvstore.errors import NativeUnavailable

_T = TypeVar("_T")
_FOLDER: Final = Path(__file__).parent / "cpp"
_FLAGS: Final = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
# GCC inlines less the larger a source is, and copies functions for constant arguments first: without these, the
# innermost loops of linears and attention became calls when a kernel was added, and decode at batch 32 some 3 % slower.
_INLINING: Final = ("-fno-ipa-cp-clone", "--param=inline-unit-growth=100")
SOURCES: Final = native.Sources(_FOLDER, "kernels.cpp", (*_FLAGS, *_INLINING))
# -ffp-contract=off: weights are the same whole numbers on every CPU (token_weights.h).
SAMPLING_SOURCES: Final = native.Sources(_FOLDER, "sampling.cpp", (*_FLAGS, "-ffp-contract=off"))


def build_library(sources: native.Sources = SOURCES) -> Path:
    """The compiled kernels. Blocks: some seconds the first time, while another process compiles them, too.

    Raises:
        KernelsUnavailable: there is no compiler, it failed, or there is no folder to write to.
    """
    return _as_ours(native.build_library, sources)


def load_library(sources: native.Sources = SOURCES) -> ctypes.CDLL:
    """The same, loaded: once per process.

    Raises:
        KernelsUnavailable: as `build_library`; or the file does not load.
    """
    return _as_ours(native.load_library, sources)


def _as_ours(make: Callable[[native.Sources], _T], sources: native.Sources) -> _T:
    try:
        return make(sources)
    except NativeUnavailable as error:
        raise KernelsUnavailable(why=error.why, hint=error.hint) from error
