"""KV values of one float type as those of another, in numpy, as words: bfloat16 is no type of numpy.

To bfloat16 the nearest value, ties to the even one, by integers; a NaN stays a NaN. Widening is exact.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Words = NDArray[Any]

WORD_TYPES: Final[dict[str, Any]] = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}


def convert(words: Words, source: str, destination: str) -> Words:
    """Values of dtype `source` as words of dtype `destination`; the same array where nothing is to be done.

    Raises:
        ValueError: to float16 from another type, which planning refuses.
    """
    if source == destination:
        return words
    if destination == "float32":
        return to_float32(words, source).view(np.uint32)
    if destination == "bfloat16":
        return to_bfloat16(to_float32(words, source))
    raise ValueError(f"{source} to {destination}: values could become infinite; both sides need the same type")


def to_float32(words: Words, source: str) -> NDArray[np.float32]:
    """Exact."""
    if source == "bfloat16":
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if source == "float16":
        return np.ascontiguousarray(words).view(np.float16).astype(np.float32)
    return np.ascontiguousarray(words).view(np.float32)


def to_bfloat16(values: NDArray[np.float32]) -> Words:
    """Rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    is_odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + (is_odd + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if is_nan.any():  # rounding could carry a NaN over into the sign or to infinity
        quiet = ((bits >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
        rounded = np.where(is_nan, quiet, rounded)
    return rounded


def from_float32(values: NDArray[np.float32], destination: str) -> Words:
    """Words of dtype `destination`. To float16 large values become infinite."""
    if destination == "float32":
        return values.view(np.uint32)
    if destination == "float16":
        return values.astype(np.float16).view(np.uint16)
    return to_bfloat16(values)
