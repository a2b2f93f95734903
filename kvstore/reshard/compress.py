"""KV in one byte per value on the wire: int8 or fp8 (e4m3), with a float32 scale per token and head. Lossy, opt-in.

    | scales float32 [..., block_size] | values [..., block_size, head_dim] |        ...: layers, 2, heads

Both ends expand by the same IEEE operations, so the writer knows the very bytes that will lie in the receiver's pages,
and its checksum speaks of them. What is not finite stays not finite: damage must not be made to look sound. A scale
per token and head, as in the int8 and fp8 caches of vLLM and TensorRT-LLM; KIVI (ICML 2024) says why not per tensor.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstore.reshard.dtypes import WORD_TYPES, Words, from_float32, to_bfloat16, to_float32
from kvstore.reshard.native import native_rows

LARGEST: Final = {"int8": 127.0, "fp8": 448.0}  # what the largest value of a token and head becomes


def compressed_bytes(shape: tuple[int, ...]) -> int:
    """Of an array `[..., block_size, head_dim]`."""
    num_values = int(np.prod(shape))
    return num_values + 4 * (num_values // shape[-1])


def compress(words: Words, dtype: str, kind: str, out: NDArray[np.uint8]) -> None:
    """Values of `dtype`, `[..., block_size, head_dim]`, into `out`, `compressed_bytes(words.shape)` bytes."""
    native = native_rows()
    if native is not None:
        table = _fp8_table() if kind == "fp8" else None
        if native.compress(np.ascontiguousarray(words), dtype, 1 / LARGEST[kind], table, out):
            return
    values = to_float32(words, dtype)
    scales = np.abs(values).max(axis=-1) * np.float32(1 / LARGEST[kind])
    divisors = np.where(scales > 0, scales, np.float32(1))
    with np.errstate(invalid="ignore"):
        scaled = (values / divisors[..., None]).astype(np.float32, copy=False)
    np.nan_to_num(scaled, copy=False)
    num_scale_bytes = 4 * scales.size
    out[:num_scale_bytes].view(np.float32)[:] = scales.reshape(-1)
    small: NDArray[Any] = _to_int8(scaled) if kind == "int8" else _to_fp8(scaled)
    out[num_scale_bytes:] = small.reshape(-1)


def expand(packed: NDArray[np.uint8], shape: tuple[int, ...], dtype: str, kind: str) -> Words:
    """Words of `dtype` with this shape out of what `compress` made."""
    native = native_rows()
    if native is not None:
        words: Words = np.empty(shape, dtype=WORD_TYPES[dtype])
        if native.expand(packed, dtype, _fp8_values() if kind == "fp8" else None, words):
            return words
    num_scale_bytes = 4 * (int(np.prod(shape)) // shape[-1])
    scales = packed[:num_scale_bytes].view(np.float32).reshape(shape[:-1])
    small = packed[num_scale_bytes:].reshape(shape)
    values = small.view(np.int8).astype(np.float32) if kind == "int8" else _fp8_values()[small]
    with np.errstate(invalid="ignore"):
        return from_float32(values * scales[..., None], dtype)


def _to_int8(scaled: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.clip(np.rint(scaled), -127, 127).astype(np.int8).view(np.uint8)


def _to_fp8(scaled: NDArray[np.float32]) -> NDArray[np.uint8]:
    """By way of bfloat16, which is four bits finer than e4m3: a table of all its values is small."""
    found: NDArray[np.uint8] = _fp8_table()[to_bfloat16(scaled)]
    return found


@cache
def _fp8_values() -> NDArray[np.float32]:
    """Value of each e4m3 byte (the variant without infinities: 0x7F and 0xFF are NaN)."""
    codes = np.arange(256)
    exponents, fractions = (codes >> 3) & 15, codes & 7
    magnitudes = np.where(exponents == 0, fractions / 8 * 2.0**-6, (1 + fractions / 8) * 2.0 ** (exponents - 7))
    magnitudes[(codes & 127) == 127] = np.nan
    return np.where(codes < 128, magnitudes, -magnitudes).astype(np.float32)


@cache
def _fp8_table() -> NDArray[np.uint8]:
    """The nearest e4m3 byte of each bfloat16, ties to the even one; beyond the range the largest."""
    magnitudes = _fp8_values()[:127]
    words = np.arange(1 << 16, dtype=np.uint16)
    values = to_float32(words, "bfloat16")
    wanted = np.minimum(np.nan_to_num(np.abs(values), nan=448.0, posinf=448.0), 448.0)
    middles = (magnitudes[:-1] + magnitudes[1:]) / 2
    lower, upper = np.searchsorted(middles, wanted, side="left"), np.searchsorted(middles, wanted, side="right")
    codes = np.where(lower % 2 == 0, lower, upper).astype(np.uint8)
    table: NDArray[np.uint8] = np.where(words >> 15 == 1, codes | 128, codes).astype(np.uint8)
    return table
