"""What a layer does to each token by itself: norms, SiLU, rotation. One Protocol; torch here, C++ in `engines.ext`.

Numerics of the torch version follow transformers step by step; the C++ one computes in fp32 and rounds once.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from engines.models.rope import rotate


class RowOps(Protocol):
    """Stateless, any thread. Tensors are on the model's device and of its dtype, contiguous in their last dimension."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm over the last dimension of `x` `[num_tokens, hidden]` or `[num_tokens, heads, dim]`."""

    def add_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add `delta` to `hidden` in place, then `norm` of it: both `[num_tokens, hidden]`."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`[num_tokens, 2 * inner]` -> silu(first half) * second half, `[num_tokens, inner]`."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of `x` `[num_tokens, heads, head_dim]`, maybe in place: use only what is returned."""


class TorchRowOps:
    """Plain torch."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(hidden.add_(delta), weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(x, cos, sin)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension: in fp32, cast back, then scaled."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
