"""Linear layers on oneDNN with the weight packed once, where torch packs it again at every call.

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


class OnednnBackend:
    """See `LinearBackend`."""

    name = "onednn"

    def make(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return OnednnLinear(weight, bias)
