"""KV as int8 on the wire: one float32 scale per token and head, absmax / 127. Lossy; the setting is opt-in.

    | scales float32 [..., block_size] | values int8 [..., block_size, head_dim] |     ...: layers, 2, heads

Both ends expand by the same two IEEE operations, so the writer knows the very bytes that will lie in the receiver's
pages, and its checksum speaks of them. What is not finite stays not finite: damage must not be made to look sound.
Keys and values per token and head, as in the per-token schemes of KIVI (ICML 2024) and of vLLM's int8 cache.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstore.reshard.dtypes import Words, from_float32, to_float32


def compressed_bytes(shape: tuple[int, ...]) -> int:
    """Of an array `[..., block_size, head_dim]`."""
    num_values = int(np.prod(shape))
    return num_values + 4 * (num_values // shape[-1])


def compress(words: Words, dtype: str, out: NDArray[np.uint8]) -> None:
    """Values of `dtype`, `[..., block_size, head_dim]`, into `out`, `compressed_bytes(words.shape)` bytes."""
    values = to_float32(words, dtype)
    scales = np.abs(values).max(axis=-1) * np.float32(1 / 127)
    divisors = np.where(scales > 0, scales, np.float32(1))
    with np.errstate(invalid="ignore"):
        rounded = np.rint(values / divisors[..., None])
    np.nan_to_num(rounded, copy=False)
    num_scale_bytes = 4 * scales.size
    out[:num_scale_bytes].view(np.float32)[:] = scales.reshape(-1)
    out[num_scale_bytes:].view(np.int8)[:] = np.clip(rounded, -127, 127).reshape(-1)


def expand(packed: NDArray[np.uint8], shape: tuple[int, ...], dtype: str) -> Words:
    """Words of `dtype` with this shape out of what `compress` made."""
    num_scale_bytes = 4 * (int(np.prod(shape)) // shape[-1])
    scales = packed[:num_scale_bytes].view(np.float32).reshape(shape[:-1])
    values = packed[num_scale_bytes:].view(np.int8).reshape(shape)
    with np.errstate(invalid="ignore"):
        return from_float32(values.astype(np.float32) * scales[..., None], dtype)
