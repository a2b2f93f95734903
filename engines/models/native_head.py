"""From hidden states to logits in one C++ call (cpp/head.h), where norm and head are C++: also the largest of each row.

Same bits as norm, head and `find_peaks` called one by one.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_void_p

import numpy as np
import torch
from torch import Tensor

from engines.ext.library import Kernels
from engines.linear.backend import Linear
from engines.linear.native_linear import NativeLinear, WeightArgs
from engines.sampling.peaks import GroupMaxima


class _HeadArgs(ctypes.Structure):
    """`struct Head` of cpp/head.h, field by field."""

    _fields_ = (("norm", c_void_p), ("weight", WeightArgs), ("eps", c_float))


class NativeHead:
    """Holds the addresses of the weights and keeps them alive."""

    def __init__(self, norm: Tensor, linear: NativeLinear, eps: float, kernels: Kernels) -> None:
        self._kernels = kernels
        self._kept = (norm, linear)
        self._num_out = linear.num_out
        self._args = _HeadArgs(norm=norm.data_ptr(), weight=linear.args, eps=eps)
        self._address = ctypes.addressof(self._args)
        self._last: tuple[Tensor, GroupMaxima] | None = None

    @classmethod
    def of(cls, norm: Tensor, linear: Linear, eps: float, kernels: Kernels | None) -> NativeHead | None:
        """None where the head is not C++: then its parts are called one by one."""
        if kernels is None or not isinstance(linear, NativeLinear) or linear.args.num_in != linear.num_in:
            return None
        return cls(norm, linear, eps, kernels)

    def run(self, hidden: Tensor, *, with_maxima: bool = False) -> tuple[Tensor, list[int], list[int]]:
        """fp32 logits `[num_rows, vocab]` of `[num_rows, hidden]`, and what `find_peaks` finds in them. Blocks.

        Args:
            with_maxima: for `maxima_of`. It takes some 3 % longer.
        """
        self._last = None  # its memory serves again
        hidden = hidden.contiguous()
        num_rows = hidden.shape[0]
        logits = torch.empty((num_rows, self._num_out), dtype=torch.float32)
        ids, is_nan = np.empty(num_rows, dtype=np.int64), np.empty(num_rows, dtype=np.bool_)
        group = self._kernels.head_group
        num_groups = -(-self._num_out // group)
        # An odd number of cache lines, so that what all rows have of a panel, written together, lies in different sets.
        maxima = np.empty((num_rows, (-(-num_groups // 16) | 1) * 16), dtype=np.float32)
        self._kernels.run_head(
            self._address,
            num_rows,
            hidden.data_ptr(),
            logits.data_ptr(),
            ids.ctypes.data,
            is_nan.ctypes.data,
            maxima.ctypes.data if with_maxima else None,
            maxima.shape[1],
            torch.get_num_threads(),
        )
        if with_maxima:
            self._last = logits, GroupMaxima(maxima, group)
        return logits, ids.tolist(), is_nan.nonzero()[0].tolist()

    def maxima_of(self, logits: Tensor) -> GroupMaxima | None:
        """Of the logits that `run` gave last, if it was asked for them and nobody has changed the logits; else None."""
        if self._last is None or self._last[0] is not logits:
            return None
        return self._last[1]
