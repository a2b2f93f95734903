"""Linear layers as torch has them: any device, any dtype."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from engines.linear.backend import Linear


class TorchLinear:
    """Keeps the weight as it is, shared with whoever else has it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def wide(self, x: Tensor) -> Tensor:
        return self(x).float()


class TorchBackend:
    """See `LinearBackend`."""

    name = "torch"
    is_batch_invariant = False
    is_on_tiles = False

    def make(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        return TorchLinear(weight, bias)
