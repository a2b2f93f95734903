"""Attention of decode rows in which no shape and no decision depends on the step: what a graph can hold.

Contexts and block tables are read from tensors of fixed size and place, so the same kernels serve every step. All rows
are gathered over the same number of pages; what a row does not have lies in the scratch block, which holds zeros.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from engines.attention.backend import LayerAttention
from engines.attention.pages import FlatPages


class DecodeTensors(Protocol):
    """Where a step is: `slots` and `contexts` `[num_rows]`, `tables` `[num_rows, num_pages]`, int64, on the device."""

    @property
    def slots(self) -> Tensor: ...
    @property
    def contexts(self) -> Tensor: ...
    @property
    def tables(self) -> Tensor: ...
    @property
    def scratch_block(self) -> int: ...


class GraphAttention(LayerAttention, Protocol):
    """For steps of decode rows. `begin` and all after it are recorded, `plan` is not."""

    def plan(self, contexts: NDArray[np.int64], tables: NDArray[np.int64]) -> None:
        """What the host has to prepare for the step that the tensors hold, given as they are on the host."""

    def begin(self) -> None:
        """Prepare what all layers share, from the tensors."""


class PaddedWrites:
    """Stores the step's keys and values; padding rows store zeros. `begin` and `write_kv` are recorded."""

    def __init__(self, kv: Tensor, inputs: DecodeTensors) -> None:
        self._kv = kv
        self._inputs = inputs
        self._blocks = self._offsets = self._is_padding = inputs.slots

    def begin(self) -> None:
        """Find the places of the step."""
        block_size = self._kv.shape[4]
        self._blocks = torch.div(self._inputs.slots, block_size, rounding_mode="floor")
        self._offsets = self._inputs.slots % block_size
        self._is_padding = (self._blocks == self._inputs.scratch_block)[:, None, None]

    def write_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        """As `LayerAttention.write_kv`. Whatever padding rows compute, zeros are what the scratch block keeps."""
        self._kv[:, layer, 0][self._blocks, :, self._offsets] = k.masked_fill(self._is_padding, 0)
        self._kv[:, layer, 1][self._blocks, :, self._offsets] = v.masked_fill(self._is_padding, 0)


class PaddedDecodeAttention:
    """`kv` as for `TorchAttention`; `inputs` stay where they are. One thread only."""

    def __init__(self, kv: Tensor, inputs: DecodeTensors) -> None:
        self._kv = kv
        self._inputs = inputs
        self._pages = FlatPages(kv)
        self._block_size, self._head_dim = kv.shape[4], kv.shape[5]
        self._row_idx = torch.arange(len(inputs.slots), device=kv.device)
        self._scale = float(self._head_dim**-0.5)
        nothing = torch.empty(0, dtype=torch.int64, device=kv.device)
        self._writes = PaddedWrites(kv, inputs)
        self._key_pages = self._last_page = self._is_seen = self._is_own = nothing

    def plan(self, contexts: NDArray[np.int64], tables: NDArray[np.int64]) -> None:
        """Nothing: all of it is on the device."""

    def begin(self) -> None:
        contexts, tables = self._inputs.contexts, self._inputs.tables
        self._writes.begin()
        self._key_pages = self._pages.keys_on_device(tables)
        token_idx = torch.arange(tables.shape[1] * self._block_size, device=tables.device)
        self._is_seen = (token_idx < contexts[:, None])[:, None, None, :]
        self._last_page = torch.div(contexts - 1, self._block_size, rounding_mode="floor")
        num_own = contexts - self._last_page * self._block_size  # tokens in the last page
        self._is_own = (token_idx[: self._block_size] < num_own[:, None])[:, None, :, None]

    def write_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._writes.write_kv(layer, k, v)

    def forward(self, layer: int, q: Tensor) -> Tensor:
        """`q` `[num_rows, num_heads, head_dim]`. The query heads that share a KV head act as its queries."""
        num_rows, num_kv_heads = q.shape[0], self._kv.shape[3]
        gathered = self._pages.gather(layer, self._key_pages)
        for each in gathered:
            # A row's other pages are full of its tokens or the scratch block. Here unused slots may hold anything, and
            # 0 * NaN is NaN, so masking the scores alone would not do.
            pages = each.view(num_rows, num_kv_heads, -1, self._block_size, self._head_dim)
            last = pages[self._row_idx, :, self._last_page]
            pages[self._row_idx, :, self._last_page] = last.masked_fill(~self._is_own, 0)
        context = (num_rows, num_kv_heads, -1, self._head_dim)
        keys, values = (each.view(context) for each in gathered)
        out = F.scaled_dot_product_attention(
            q.reshape(context), keys, values, attn_mask=self._is_seen, scale=self._scale
        )
        return out.reshape(q.shape)
