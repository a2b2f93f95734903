"""What a model needs of attention, and what attention is told about a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec
from torch import Tensor


class AttentionRow(msgspec.Struct, frozen=True):
    """One sequence's part of the packed batch: queries at positions [start, start + num_new_tokens).

    `block_table[i]` holds the KV of positions [i * block_size, (i + 1) * block_size); it may be longer than needed.
    """

    start: int
    num_new_tokens: int
    block_table: list[int]

    @property
    def context_len(self) -> int:
        """Tokens that the last query sees, itself included."""
        return self.start + self.num_new_tokens


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """One step. `slot_mapping` `[num_tokens]` int64: slot = block_id * block_size + offset of each token."""

    rows: tuple[AttentionRow, ...]
    slot_mapping: Tensor


class LayerAttention(Protocol):
    """What a model calls of an attention whose step has begun: per layer `write_kv`, then `forward`."""

    def write_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store this step's keys and values, `[num_tokens, num_kv_heads, head_dim]` each, rotated."""

    def forward(self, layer: int, q: Tensor) -> Tensor:
        """Causal attention of `q` `[num_tokens, num_heads, head_dim]`, row by row; the output has its shape."""


class AttentionBackend(LayerAttention, Protocol):
    """Owned by the engine thread. Per step: `begin_step`, then per layer `write_kv` before `forward`.

    No value of a slot that holds no token of the row may reach its output, whatever bits are there, NaN included.
    """

    def begin_step(self, metadata: AttentionMetadata) -> None:
        """Prepare what all layers of the step share."""
