"""Names of full blocks by their content and all that comes before it.

    key(i) = xxh3_128(key(i-1), token ids of block i)       key(-1) = xxh3_128(salt)

Equal keys mean equal tokens at equal positions for the same tenant (the salt), hence equal KV of one model.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import xxhash


def block_keys(token_ids: Sequence[int], num_blocks: int, block_size: int, *, salt: bytes | str) -> Iterator[bytes]:
    """16 bytes for each of the first `num_blocks` blocks, which must be full."""
    parent = xxhash.xxh3_128_digest(salt.encode() if isinstance(salt, str) else salt)
    for start in range(0, num_blocks * block_size, block_size):
        block_ids = array("q", token_ids[start : start + block_size])
        parent = xxhash.xxh3_128_digest(parent + block_ids.tobytes())
        yield parent
