"""Row operations in C++: one call and one pass over memory each, where torch takes five."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.ext.library import Kernels


class NativeRowOps:
    """`engines.models.row_ops.RowOps` on a CPU."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        num_heads = x.shape[1] if x.dim() == 3 else 1
        size = x.shape[-1]
        out = torch.empty(x.shape, dtype=x.dtype)
        threads = torch.get_num_threads()
        self._kernels.norm(
            x.shape[0],
            num_heads,
            size,
            x.data_ptr(),
            x.stride(0),
            None,
            weight.data_ptr(),
            eps,
            out.data_ptr(),
            num_heads * size,
            threads,
        )
        return out

    def add_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        num_tokens, size = hidden.shape
        assert delta.is_contiguous()
        out = torch.empty_like(hidden)
        self._kernels.norm(
            num_tokens,
            1,
            size,
            hidden.data_ptr(),
            hidden.stride(0),
            delta.data_ptr(),
            weight.data_ptr(),
            eps,
            out.data_ptr(),
            out.stride(0),
            torch.get_num_threads(),
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        assert gate_up.is_contiguous()
        num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((num_tokens, size), dtype=gate_up.dtype)
        self._kernels.silu_mul(num_tokens, size, gate_up.data_ptr(), out.data_ptr(), torch.get_num_threads())
        return out

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """In place. `cos` and `sin` are `[num_tokens, 1, head_dim]`, contiguous."""
        num_tokens, num_heads, head_dim = x.shape
        self._kernels.rotate(
            num_tokens,
            num_heads,
            head_dim,
            x.data_ptr(),
            x.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            torch.get_num_threads(),
        )
        return x
