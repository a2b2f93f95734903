"""The fixed memory that a decode graph reads its step from. Rows that no sequence fills compute on a scratch block.

    ids [B] | positions [B] | slots [B] | contexts [B] | tables [B * P]         one int64 tensor, filled by one copy

A padding row is a sequence of one token, id 0, whose block is the scratch block: one that the pool does not have, so
no live sequence ever reads it. Entries of a table behind its row's last page aim there, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from engines.attention.backend import AttentionRow
from engines.packed_batch import PackedBatch
from engines.staging import Staging


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A step of decode rows on the host, padded to `[B]` and `[B, P]`, int64."""

    contexts: NDArray[np.int64]
    tables: NDArray[np.int64]

    @classmethod
    def padded(
        cls, rows: Sequence[AttentionRow], *, num_rows: int, num_pages: int, block_size: int, scratch_block: int
    ) -> DecodeStep:
        """`rows` have one new token each and at most `num_pages` pages with tokens in them."""
        contexts = np.ones(num_rows, dtype=np.int64)
        contexts[: len(rows)] = [row.start + 1 for row in rows]
        lengths = np.array([len(row.block_table) for row in rows], dtype=np.int64)
        total = int(lengths.sum())
        blocks = np.fromiter(chain.from_iterable(row.block_table for row in rows), dtype=np.int64, count=total)
        row_idx = np.repeat(np.arange(len(rows)), lengths)
        page_idx = np.arange(total) - np.repeat(lengths.cumsum() - lengths, lengths)
        is_used = page_idx < -(-contexts // block_size)[row_idx]
        tables = np.full((num_rows, num_pages), scratch_block, dtype=np.int64)
        tables[row_idx[is_used], page_idx[is_used]] = blocks[is_used]
        return cls(contexts, tables)


class DecodeInputs:
    """Owned by the engine thread. The tensors stay where they are; `load` changes what is in them."""

    def __init__(
        self, *, num_rows: int, num_pages: int, block_size: int, scratch_block: int, device: torch.device
    ) -> None:
        self.num_rows, self.num_pages = num_rows, num_pages
        self.block_size, self.scratch_block = block_size, scratch_block
        self._all = torch.empty(num_rows * (4 + num_pages), dtype=torch.int64, device=device)
        fixed = self._all[: 4 * num_rows].view(4, num_rows)
        self.ids, self.positions, self.slots, self.contexts = fixed.unbind()
        self.tables = self._all[4 * num_rows :].view(num_rows, num_pages)

    def load(self, batch: PackedBatch, rows: Sequence[AttentionRow], staging: Staging) -> DecodeStep:
        """Put a step in; no rows at all: a step of padding."""
        step = DecodeStep.padded(
            rows,
            num_rows=self.num_rows,
            num_pages=self.num_pages,
            block_size=self.block_size,
            scratch_block=self.scratch_block,
        )
        slots = np.full(self.num_rows, self.scratch_block * self.block_size, dtype=np.int64)
        slots[: len(rows)] = batch.slots
        staging.fill(
            self._all, self._padded(batch.ids), self._padded(batch.positions), slots, step.contexts, step.tables.ravel()
        )
        return step

    def load_padding(self, staging: Staging) -> DecodeStep:
        """A step that no sequence takes part in."""
        nothing = np.empty(0, dtype=np.int64)
        return self.load(PackedBatch(nothing, nothing, nothing), (), staging)

    def _padded(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        padded = np.zeros(self.num_rows, dtype=np.int64)
        padded[: len(numbers)] = numbers
        return padded
