"""Linear layers on oneDNN with the weight packed once, where torch packs it again at every call.

Measured bit for bit: a row's result does not depend on how many other rows there are, except that a single row may be
multiplied by other code (seen in float32 at 1536 input features). `DoubledOnednnLinear` never asks for a single row.

CPU only. A packed weight is a copy: tied embeddings stay as they are for the look-up, the packed head beside them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engines.linear.backend import Linear

# The operators behind torch.compile's packed linears; they have no public name.
_ops: Any = torch.ops.mkldnn


class OnednnLinear:
    """Holds the weight in oneDNN's blocked order."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # No number of rows is named: the order made for one row costs float32 batches of 8 half their speed.
        self._packed = _ops._reorder_linear_weight(weight, None)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = _ops._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out

    def wide(self, x: Tensor) -> Tensor:
        return self(x).float()


class DoubledOnednnLinear:
    """The same result for a row whatever the batch: a row alone is computed twice, side by side."""

    def __init__(self, inner: OnednnLinear) -> None:
        self._inner = inner

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            return self._inner(x)
        return self._inner(x.repeat(2, 1))[:1]

    def wide(self, x: Tensor) -> Tensor:
        return self(x).float()


class OnednnBackend:
    """See `LinearBackend`. `deterministic` makes layers whose rows do not depend on the batch."""

    name = "onednn"
    is_on_tiles = False  # where it takes AMX, that is no order to promise

    def __init__(self, *, deterministic: bool = False) -> None:
        self._deterministic = deterministic
        self.is_batch_invariant = deterministic

    def make(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        linear = OnednnLinear(weight, bias)
        return DoubledOnednnLinear(linear) if self._deterministic else linear
