"""What both schedulers share: who goes first, what they need of the block plane, what padding would have cost.

Order: overdue first (by arrival), then priority (lower first), deadline, arrival. Whoever waits longer than
`STARVATION_S` is overdue, so nobody is passed over for ever; and whoever is first and finds no blocks is not overtaken.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

from engines.sequence import Sequence

STARVATION_S: Final = 5.0


class BlockAllocator(Protocol):
    """Block identity. `num_free` counts cached blocks that nobody uses, too: `allocate` evicts them."""

    @property
    def num_free(self) -> int: ...
    @property
    def num_used(self) -> int: ...
    def allocate(self, num_blocks: int, /) -> list[int]:
        """All of them with one reference each, or OutOfBlocks."""
        ...

    def share(self, block_ids: list[int], /) -> None: ...
    def free(self, block_ids: list[int], /) -> None: ...


class PrefixLookup(Protocol):
    """Full blocks found again by the content of everything up to their end."""

    def match(self, token_ids: list[int], /, *, salt: str) -> list[int]:
        """Blocks of the longest known prefix, a reference taken on each; never the last token."""
        ...

    def restore(self, token_ids: list[int], block_table: list[int], first: int, /, *, salt: str) -> int:
        """Blocks from `first` on that were filled from a slower tier."""
        ...

    def insert(self, token_ids: list[int], block_table: list[int], /, *, salt: str) -> None: ...


def is_overdue(sequence: Sequence, now_s: float) -> bool:
    return now_s - sequence.arrival_s > STARVATION_S


def order_key(sequence: Sequence, now_s: float) -> tuple[bool, float, float, float]:
    """Sorts the waiting sequences; smallest goes first."""
    if is_overdue(sequence, now_s):
        return (False, sequence.arrival_s, 0.0, 0.0)
    return (True, sequence.priority, sequence.deadline_s, sequence.arrival_s)


def padding_tokens(lengths: Iterable[int]) -> int:
    """Tokens that padding a batch of these lengths to its longest adds."""
    lengths = list(lengths)
    return max(lengths, default=0) * len(lengths) - sum(lengths)


def length_bucket(num_tokens: int) -> int:
    """Bucket of a prompt length: 64, 128, ... 512, 1024, 2048 ..."""
    return max(64, 1 << (num_tokens - 1).bit_length())
