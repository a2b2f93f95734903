"""A plan as arrays: the tokens of all its sequences end to end, where each is and where its KV goes.

Built by a few array operations for the whole batch: a numpy call per sequence would cost more than its attention.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.scheduler.plan import ScheduledSequence


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """`[num_tokens]` int64 each: token ids, positions in their sequences, and slots (block * block_size + offset)."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]

    @classmethod
    def of(cls, scheduled: Items[ScheduledSequence], block_size: int) -> PackedBatch:
        """The new tokens of `scheduled`, in its order.

        Raises:
            IndexError: a sequence has no block, or no id, for a token that it is to compute.
        """
        if all(item.num_new_tokens == 1 for item in scheduled):
            return cls._of_single_tokens(scheduled, block_size)
        ids: list[int] = []
        blocks: list[int] = []
        for item in scheduled:
            end = item.start + item.num_new_tokens
            ids += item.token_ids()
            blocks += item.sequence.block_table[item.start // block_size : (end - 1) // block_size + 1]
        starts = np.array([item.start for item in scheduled], dtype=np.int64)
        counts = np.array([item.num_new_tokens for item in scheduled], dtype=np.int64)
        firsts = starts // block_size
        num_blocks = (starts + counts - 1) // block_size - firsts + 1
        if len(ids) != counts.sum() or len(blocks) != num_blocks.sum():
            raise IndexError(
                f"{counts.sum()} tokens in {num_blocks.sum()} blocks: {len(ids)} ids, {len(blocks)} blocks"
            )
        positions = np.repeat(starts - _before(counts), counts) + np.arange(len(ids))
        block_idx = positions // block_size + np.repeat(_before(num_blocks) - firsts, counts)
        slots = np.array(blocks, dtype=np.int64)[block_idx] * block_size + positions % block_size
        return cls(np.array(ids, dtype=np.int64), positions, slots)

    @classmethod
    def _of_single_tokens(cls, scheduled: Items[ScheduledSequence], block_size: int) -> PackedBatch:
        """A step of decode."""
        positions = np.array([item.start for item in scheduled], dtype=np.int64)
        ids = [item.sequence.token_at(item.start) for item in scheduled]
        blocks = [item.sequence.block_table[item.start // block_size] for item in scheduled]
        slots = np.array(blocks, dtype=np.int64) * block_size + positions % block_size
        return cls(np.array(ids, dtype=np.int64), positions, slots)


def _before(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many come before each: the sums of those in front of it."""
    before: NDArray[np.int64] = counts.cumsum() - counts
    return before
