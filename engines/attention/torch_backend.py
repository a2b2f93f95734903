"""Paged attention with plain torch: right for any mix of prefill chunks and decode rows, on any device.

    decode rows (one new token)    rows of about the same length become one padded batch; a whole page is gathered at a
                                   time, pages that hold anything but the row's own tokens are cleaned after the gather
    prefill rows                   one call each: exactly the valid tokens are gathered, no padding

Softmax and accumulation are in fp32 inside `scaled_dot_product_attention`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from engines.attention.backend import AttentionMetadata, AttentionRow
from engines.attention.pages import FlatPages


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Decode rows whose contexts fit the same number of pages.

    Attributes:
        token_idx: `[num_rows]` where their queries are in the packed batch.
        pages: `[num_rows * num_kv_heads * num_pages]` key pages of layer 0, as rows of the flat region.
        mask: `[num_rows, 1, 1, num_pages * block_size]`, True where a token of the row is.
        dirty_row, dirty_page: pages that are not full of the row's tokens; dirty_valid `[num_dirty, 1, block_size, 1]`.
    """

    token_idx: Tensor
    num_pages: int
    pages: Tensor
    mask: Tensor
    dirty_row: Tensor
    dirty_page: Tensor
    dirty_valid: Tensor


@dataclass(frozen=True, slots=True)
class _PrefillRow:
    """`pages` as in `_DecodeGroup`, one row. `mask` is None for a chunk that starts at position 0 (plain causal)."""

    lo: int
    hi: int
    context_len: int
    pages: Tensor
    mask: Tensor | None


class TorchAttention:
    """`kv` is the region `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, or some heads of one that
    begins where its storage does. One thread only.
    """

    def __init__(self, kv: Tensor) -> None:
        self._kv = kv
        self._device = kv.device
        _, _, _, self._num_kv_heads, self._block_size, self._head_dim = kv.shape
        self._pages = FlatPages(kv)
        self._scale = float(self._head_dim**-0.5)
        self._decode: list[_DecodeGroup] = []
        self._prefill: list[_PrefillRow] = []
        self._blocks = self._offsets = torch.empty(0, dtype=torch.int64, device=kv.device)

    def begin_step(self, metadata: AttentionMetadata) -> None:
        self._blocks = torch.div(metadata.slot_mapping, self._block_size, rounding_mode="floor")
        self._offsets = metadata.slot_mapping % self._block_size
        self._prefill = []
        by_bucket: dict[int, list[tuple[int, AttentionRow]]] = defaultdict(list)
        lo = 0
        for row in metadata.rows:
            if row.num_new_tokens == 1:
                num_pages = -(-row.context_len // self._block_size)
                by_bucket[_bucket(num_pages)].append((lo, row))
            else:
                self._prefill.append(self._prefill_row(lo, row))
            lo += row.num_new_tokens
        self._decode = [self._decode_group(rows) for rows in by_bucket.values()]

    def write_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._kv[:, layer, 0][self._blocks, :, self._offsets] = k
        self._kv[:, layer, 1][self._blocks, :, self._offsets] = v

    def forward(self, layer: int, q: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for group in self._decode:
            out[group.token_idx] = self._attend_decode(layer, group, q[group.token_idx])
        for row in self._prefill:
            out[row.lo : row.hi] = self._attend_prefill(layer, row, q[row.lo : row.hi])
        return out

    # ---------------------------------------------------------------- decode rows
    def _decode_group(self, rows: list[tuple[int, AttentionRow]]) -> _DecodeGroup:
        contexts = np.array([row.context_len for _, row in rows])
        num_pages = int(-(-contexts.max() // self._block_size))
        tables = np.empty((len(rows), num_pages), dtype=np.int64)
        for i, (_, row) in enumerate(rows):
            table = row.block_table[:num_pages]
            tables[i, : len(table)] = table
            tables[i, len(table) :] = table[0]  # any page of this process; it is cleaned below
        valid = np.arange(num_pages * self._block_size) < contexts[:, None]
        valid_pages = valid.reshape(len(rows), num_pages, self._block_size)
        dirty_row, dirty_page = np.nonzero(~valid_pages.all(-1))
        return _DecodeGroup(
            token_idx=self._here(np.array([lo for lo, _ in rows])),
            num_pages=num_pages,
            pages=self._here(self._pages.keys_of(tables)),
            mask=self._here(valid)[:, None, None, :],
            dirty_row=self._here(dirty_row),
            dirty_page=self._here(dirty_page),
            dirty_valid=self._here(valid_pages[dirty_row, dirty_page])[:, None, :, None],
        )

    def _attend_decode(self, layer: int, group: _DecodeGroup, q: Tensor) -> Tensor:
        """`q` `[num_rows, num_heads, head_dim]`. The query heads that share a KV head act as its queries."""
        keys, values = self._pages.gather(layer, group.pages)
        shape = (q.shape[0], self._num_kv_heads, group.num_pages, self._block_size, self._head_dim)
        for gathered in (keys, values):
            # Unused slots may hold anything: 0 * NaN is NaN, so masking the scores alone would not do.
            pages = gathered.view(shape)
            own = pages[group.dirty_row, :, group.dirty_page]
            pages[group.dirty_row, :, group.dirty_page] = own.masked_fill(~group.dirty_valid, 0)
        context = (q.shape[0], self._num_kv_heads, -1, self._head_dim)
        out = F.scaled_dot_product_attention(
            q.reshape(context), keys.view(context), values.view(context), attn_mask=group.mask, scale=self._scale
        )
        return out.reshape(q.shape)

    # ---------------------------------------------------------------- prefill rows
    def _prefill_row(self, lo: int, row: AttentionRow) -> _PrefillRow:
        num_pages = -(-row.context_len // self._block_size)
        pages = self._here(self._pages.keys_of(np.array([row.block_table[:num_pages]], dtype=np.int64)))
        mask = None
        if row.start > 0:
            keys = torch.arange(row.context_len, device=self._device)
            mask = keys <= keys[row.start :, None]
        return _PrefillRow(lo, lo + row.num_new_tokens, row.context_len, pages, mask)

    def _attend_prefill(self, layer: int, row: _PrefillRow, q: Tensor) -> Tensor:
        """`q` `[num_new_tokens, num_heads, head_dim]`; KV heads are the batch, their query heads the heads."""
        num_new, num_heads, head_dim = q.shape
        grouped = q.view(num_new, self._num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        keys, values = (
            # The slice drops the last page's unused slots; `expand` shares one KV head without copying it.
            gathered.view(self._num_kv_heads, 1, -1, head_dim)[:, :, : row.context_len].expand(
                -1, num_heads // self._num_kv_heads, -1, -1
            )
            for gathered in self._pages.gather(layer, row.pages)
        )
        out = F.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=row.mask, is_causal=row.mask is None, scale=self._scale
        )
        return out.permute(2, 0, 1, 3).reshape(q.shape)

    def _here(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def _bucket(num_pages: int) -> int:
    """Rows of one bucket are padded to its longest: at most half more, few buckets (1, 2, 3, 4, 6, 8, 12 ...)."""
    power = 1 << (num_pages - 1).bit_length()
    return power * 3 // 4 if power >= 4 and num_pages <= power * 3 // 4 else power
