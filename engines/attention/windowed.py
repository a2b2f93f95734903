"""Attention with a sliding window in some layers (Mistral v0.1, Qwen2, Qwen3).

A window shows only once a row's context is longer than it. Shorter rows, and layers without a window, go to the fast
backend; longer rows go one by one through those layers and read only the window's pages. Who computes a row depends on
the row alone, not on the others of its step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engines.attention.backend import AttentionBackend, AttentionMetadata, AttentionRow
from engines.attention.generic_attention import GenericAttention, Variant


class WindowedAttention:
    """An `AttentionBackend`.

    Args:
        make: makes a backend without windows over the region `kv`.
        windows: of each layer; all that are not None are the same.
    """

    def __init__(self, make: Callable[[], AttentionBackend], kv: Tensor, windows: tuple[int | None, ...]) -> None:
        (self._window,) = {window for window in windows if window is not None}
        self._has_window = [window is not None for window in windows]
        self._full, self._short = make(), make()
        self._long = GenericAttention(kv)
        self._num_kv_heads, self._head_dim = kv.shape[3], kv.shape[5]
        self._variant = Variant(scale=float(self._head_dim**-0.5), window=self._window)
        self._short_idx = self._long_idx = torch.empty(0, dtype=torch.int64)

    def begin_step(self, metadata: AttentionMetadata) -> None:
        self._full.begin_step(metadata)
        rows: tuple[list[AttentionRow], list[AttentionRow]] = ([], [])
        nothing = torch.empty(0, dtype=torch.int64)
        tokens = ([nothing], [nothing])  # short, long
        lo = 0
        for row in metadata.rows:
            is_long = row.context_len > self._window
            rows[is_long].append(row)
            tokens[is_long].append(torch.arange(lo, lo + row.num_new_tokens))
            lo += row.num_new_tokens
        device = metadata.slot_mapping.device
        self._short_idx, self._long_idx = torch.cat(tokens[0]).to(device), torch.cat(tokens[1]).to(device)
        if rows[True] and rows[False]:
            self._short.begin_step(AttentionMetadata(tuple(rows[False]), metadata.slot_mapping[self._short_idx]))
        self._long.begin_step(AttentionMetadata(tuple(rows[True]), metadata.slot_mapping[self._long_idx]))

    def write_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._full.write_kv(layer, k, v)

    def forward(self, layer: int, q: Tensor) -> Tensor:
        if not self._has_window[layer] or not len(self._long_idx):
            return self._full.forward(layer, q)
        out = torch.empty_like(q)
        long = q[self._long_idx]
        out[self._long_idx] = self._long.attend(layer, long, self._num_kv_heads, self._head_dim, self._variant)
        if len(self._short_idx):
            out[self._short_idx] = self._short.forward(layer, q[self._short_idx])
        return out
