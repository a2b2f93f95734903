"""The KV region seen as a flat list of pages: one row per (block, layer, keys or values, head), contiguous each."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class FlatPages:
    """`kv` is the region `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, or some heads of one that
    begins where its storage does.
    """

    def __init__(self, kv: Tensor) -> None:
        num_blocks, num_layers, _, self.num_kv_heads, self.block_size, self.head_dim = kv.shape
        page = self.block_size * self.head_dim
        self._heads_apart, self._first_head = kv.stride(2) // page, kv.storage_offset() // page
        self._block_apart = num_layers * 2 * self._heads_apart
        shape, strides = (num_blocks * self._block_apart, self.block_size, self.head_dim), (page, self.head_dim, 1)
        self._flat = kv.as_strided(shape, strides, 0)

    def keys_of(self, tables: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows with the key pages of layer 0 of `tables` `[num_rows, num_pages]`, in the order (row, head, page).

        int64, because regions are large.
        """
        heads = self._first_head + np.arange(self.num_kv_heads)[None, :, None]
        rows: NDArray[np.int64] = (tables[:, None, :] * self._block_apart + heads).reshape(-1)
        return rows

    def keys_on_device(self, tables: Tensor) -> Tensor:
        """`keys_of` where the region is, with nothing that asks the host."""
        heads = self._first_head + torch.arange(self.num_kv_heads, device=tables.device)[None, :, None]
        return (tables[:, None, :] * self._block_apart + heads).flatten()

    def gather(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) of a layer, `[len(pages), block_size, head_dim]` each."""
        first = pages + layer * 2 * self._heads_apart
        return self._flat.index_select(0, first), self._flat.index_select(0, first + self._heads_apart)
