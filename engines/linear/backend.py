"""What a model needs of a linear layer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Linear(Protocol):
    """`x @ weight.T + bias` for one weight. Owned by the engine thread."""

    def __call__(self, x: Tensor) -> Tensor:
        """`[num_rows, in_features]`, contiguous -> `[num_rows, out_features]`, contiguous, of the same dtype."""

    def wide(self, x: Tensor) -> Tensor:
        """The same in fp32: what a head gives the sampler. Rounded to the dtype first by some libraries."""


class LinearBackend(Protocol):
    """Makes `Linear`s. `name` is what the log and the settings call it."""

    name: str
    is_batch_invariant: bool  # the bits of a row depend on nothing but the row
    is_on_tiles: bool  # added up in the order of AMX

    def make(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """A layer for `weight` `[out_features, in_features]`, which it may keep or copy in an order of its own."""
