"""The prefix hash: a rolling hash over the token ids of one choice.

`hash_of([])` is 0. It travels with every append and every feed entry (docs/architecture.md, "Three fences"):
an entry is accepted only behind the very text it was computed for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import xxhash

_PAIR = struct.Struct("<QI")


def roll(prefix_hash: int, token_id: int) -> int:
    """Hash (63 bits, so that it fits a signed integer everywhere) of a prefix that grows by one token."""
    return xxhash.xxh3_64_intdigest(_PAIR.pack(prefix_hash, token_id)) >> 1


def hash_of(token_ids: Iterable[int], *, start: int = 0) -> int:
    """Rolling hash over `token_ids`, going on from `start`."""
    value = start
    for token_id in token_ids:
        value = roll(value, token_id)
    return value
