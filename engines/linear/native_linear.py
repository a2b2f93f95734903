"""Linear layers in C++: packed weights that stream at the speed of memory; a row depends on nothing but itself.

Every output is summed over the input features in one order, whatever the number of rows or threads: a row alone equals
the same row in any batch, bit for bit (cpp/linear.h). CPU only; a packed weight is a copy, as with oneDNN.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from engines.ext.library import Kernels


class WeightArgs(ctypes.Structure):
    """`struct Weight` of cpp/linear.h, field by field."""

    _fields_ = (("panels", c_void_p), ("bias", c_void_p), ("num_in", c_int64), ("num_out", c_int64))


class NativeLinear:
    """One packed weight. `args` is what C++ reads of it, valid as long as this object lives."""

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor | None) -> None:
        self._kernels = kernels
        self.num_out, self.num_in = weight.shape
        # bfloat16 is multiplied in pairs along the input: an odd number of features gets one more that is zero.
        self._padding = self.num_in % 2
        weight = F.pad(weight, (0, self._padding)).contiguous()
        num_in = weight.shape[1]
        self._panels = torch.empty(kernels.packed_size(num_in, self.num_out), dtype=weight.dtype)
        kernels.pack_weight(weight.data_ptr(), num_in, self.num_out, self._panels.data_ptr(), torch.get_num_threads())
        self._bias = None if bias is None else bias.contiguous()
        self.args = WeightArgs(
            panels=self._panels.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            num_in=num_in,
            num_out=self.num_out,
        )
        self._address = ctypes.addressof(self.args)

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.empty((x.shape[0], self.num_out), dtype=x.dtype)
        self._run(self._kernels.linear, x, out)
        return out

    def wide(self, x: Tensor) -> Tensor:
        """The same in fp32, not rounded to the dtype of `x`."""
        out = torch.empty((x.shape[0], self.num_out), dtype=torch.float32)
        self._run(self._kernels.linear_wide, x, out)
        return out

    def _run(self, function: ctypes._NamedFuncPointer, x: Tensor, out: Tensor) -> None:
        assert x.dtype == self._kernels.dtype
        assert x.shape[1] == self.num_in, (x.shape, self.num_in)
        if self._padding:
            x = F.pad(x, (0, self._padding))
        assert x.stride(1) == 1
        function(self._address, x.shape[0], x.data_ptr(), x.stride(0), out.data_ptr(), torch.get_num_threads())


class NativeBackend:
    """See `LinearBackend`."""

    name = "native"

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def make(self, weight: Tensor, bias: Tensor | None = None) -> NativeLinear:
        return NativeLinear(self._kernels, weight, bias)
