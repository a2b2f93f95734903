"""Where the kernels' sources are and how they are compiled; `kvstore.native` builds and caches them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from engines.errors import KernelsUnavailable
from kvstore import native
from kvstore.errors import NativeUnavailable

SOURCES: Final = native.Sources(
    folder=Path(__file__).parent / "cpp",
    main="kernels.cpp",
    flags=("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"),
)


def build_library() -> Path:
    """The compiled kernels. Blocks: some seconds the first time, while another process compiles them, too.

    Raises:
        KernelsUnavailable: there is no compiler, it failed, or there is no folder to write to.
    """
    try:
        return native.build_library(SOURCES)
    except NativeUnavailable as error:
        raise KernelsUnavailable(why=error.why, hint=error.hint) from error
