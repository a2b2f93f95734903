"""A linear layer of which each rank holds some input columns: what it gives is a part of a sum."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from engines.linear.backend import Linear


class SummedLinear:
    """See `Linear`. `add_up`: the sum over all ranks, which all of them call in the same order."""

    def __init__(self, inner: Linear, add_up: Callable[[Tensor], Tensor]) -> None:
        self._inner = inner
        self._add_up = add_up

    def __call__(self, x: Tensor) -> Tensor:
        return self._add_up(self._inner(x))

    def wide(self, x: Tensor) -> Tensor:
        return self._add_up(self._inner.wide(x))
