"""What the rest of the engine needs to know of a model, whoever runs it."""

from __future__ import annotations

from typing import Protocol


class ModelShape(Protocol):
    """Decides the layout of the KV region, the longest context and the end of a text."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def kv_size(self) -> int:
        """Elements of one token's keys in one layer of the region."""

    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
