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

    @classmethod
    def of(cls, norm: Tensor, linear: Linear, eps: float, kernels: Kernels | None) -> NativeHead | None:
        """None where the head is not C++: then its parts are called one by one."""
        if kernels is None or not isinstance(linear, NativeLinear) or linear.args.num_in != linear.num_in:
            return None
        return cls(norm, linear, eps, kernels)

    def run(self, hidden: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """fp32 logits `[num_rows, vocab]` of `[num_rows, hidden]`, and what `find_peaks` finds in them. Blocks."""
        hidden = hidden.contiguous()
        num_rows = hidden.shape[0]
        logits = torch.empty((num_rows, self._num_out), dtype=torch.float32)
        ids, is_nan = np.empty(num_rows, dtype=np.int64), np.empty(num_rows, dtype=np.bool_)
        self._kernels.run_head(
            self._address,
            num_rows,
            hidden.data_ptr(),
            logits.data_ptr(),
            ids.ctypes.data,
            is_nan.ctypes.data,
            torch.get_num_threads(),
        )
        return logits, ids.tolist(), is_nan.nonzero()[0].tolist()
