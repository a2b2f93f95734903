"""Attention for models that transformers runs: every variant that its attention functions take as arguments.

Plain torch, one sequence at a time: right for whatever mix of layers a model has, and slower than the other backends.
Layers may differ in heads and head size; each uses a corner of the region, whose shape is that of the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engines.attention.backend import AttentionMetadata


@dataclass(frozen=True, slots=True)
class Variant:
    """What a layer does to the scores.

    Attributes:
        scale: of the scores.
        window: the last so many tokens are seen, the query's own included; None is all.
        softcap: scores go through softcap * tanh(score / softcap).
        sinks: `[num_heads]` a score that takes part in the softmax and has no value (gpt-oss).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class GenericAttention:
    """`kv` is the region `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`. One thread only."""

    def __init__(self, kv: Tensor) -> None:
        self._kv = kv
        self._block_size, self._head_dim = kv.shape[4], kv.shape[5]
        self._metadata = AttentionMetadata((), torch.empty(0, dtype=torch.int64))
        self._blocks = self._offsets = self._metadata.slot_mapping

    def begin_step(self, metadata: AttentionMetadata) -> None:
        self._metadata = metadata
        self._blocks = torch.div(metadata.slot_mapping, self._block_size, rounding_mode="floor")
        self._offsets = metadata.slot_mapping % self._block_size

    def write_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        for which, states in enumerate((k, v)):
            _, num_heads, head_dim = states.shape
            self._kv[:, layer, which, :num_heads, :, :head_dim][self._blocks, :, self._offsets] = states

    def forward(self, layer: int, q: Tensor) -> Tensor:
        """Plain causal attention over heads and a head size that are those of the region."""
        num_kv_heads = self._kv.shape[3]
        return self.attend(layer, q, num_kv_heads, self._head_dim, Variant(scale=float(q.shape[-1] ** -0.5)))

    def attend(self, layer: int, q: Tensor, num_kv_heads: int, value_dim: int, variant: Variant) -> Tensor:
        """`q` `[num_tokens, num_heads, head_dim]`; the result has `value_dim` in the place of `head_dim`."""
        parts, lo = [], 0
        for row in self._metadata.rows:
            queries = q[lo : lo + row.num_new_tokens]
            lo += row.num_new_tokens
            first = 0 if variant.window is None else max(0, row.start - variant.window + 1)
            first_block = first // self._block_size
            first = first_block * self._block_size
            table = row.block_table[first_block : -(-row.context_len // self._block_size)]
            num_keys = row.context_len - first
            keys, values = (
                # [pages, heads, block_size, dim] -> [heads, tokens, dim], without the unused slots of the last page.
                self._kv[table, layer, which, :num_kv_heads, :, :dim].transpose(0, 1).flatten(1, 2)[:, :num_keys]
                for which, dim in ((0, q.shape[-1]), (1, value_dim))
            )
            seen_from = torch.arange(row.start, row.context_len, device=q.device)[:, None]
            distance = seen_from - torch.arange(first, row.context_len, device=q.device)
            is_seen = distance >= 0
            if variant.window is not None:
                is_seen &= distance < variant.window
            parts.append(_attend(queries, keys, values, is_seen, variant))
        return torch.cat(parts)


def _attend(q: Tensor, keys: Tensor, values: Tensor, is_seen: Tensor, variant: Variant) -> Tensor:
    """`q` `[num_new, num_heads, dim]`, keys and values `[num_kv_heads, num_keys, dim]`; softmax in fp32."""
    num_new, num_heads, head_dim = q.shape
    num_kv_heads, num_keys, _ = keys.shape
    grouped = q.view(num_new, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [kv head, its queries, num_new, dim]
    scores = torch.matmul(grouped, keys[:, None].transpose(2, 3)) * variant.scale
    if variant.softcap is not None:
        scores = torch.tanh(scores / variant.softcap) * variant.softcap
    scores = scores.masked_fill(~is_seen, float("-inf")).float()
    if variant.sinks is not None:
        sinks = variant.sinks.float().view(num_kv_heads, -1, 1, 1).expand(-1, -1, num_new, 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(-1)[..., :num_keys].to(q.dtype)
    out = torch.matmul(weights, values[:, None])
    return out.permute(2, 0, 1, 3).reshape(num_new, num_heads, -1)
