"""Linear layers in C++: packed weights that stream at the speed of memory; a row depends on nothing but itself.

Every output is summed over the input features in one order, whatever the number of rows or threads: a row alone equals
the same row in any batch, bit for bit (cpp/linear.h), with quantised weights and on AMX tiles, too. CPU only; a packed
weight is a copy, as with oneDNN.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from engines.ext.library import Kernels
from engines.linear.amx import Tiles
from engines.linear.packed_memory import PackedMemory
from engines.linear.quantize import pack_numbers, pack_scales, quantize

_KINDS: Final = {16: 0, 8: 1, 4: 2}  # bits -> `enum class Kind` of cpp/formats.h
_TILE_DEPTH: Final = 32  # inputs: the depth of weights for tiles is filled up to whole ones, as cpp/amx_linear.h has it
_PANELS_AT_ONCE: Final = 128  # quantised in fp32: not a whole head of 150,000 outputs at a time


@dataclass(frozen=True, slots=True)
class Quantization:
    """How weights are stored. `group`: inputs per scale; 0 is all of them."""

    bits: int
    group: int = 0


INT8: Final = Quantization(bits=8)


class WeightArgs(ctypes.Structure):
    """`struct Weight` of cpp/formats.h, field by field."""

    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("num_in", c_int64),
        ("num_out", c_int64),
        ("kind", c_int64),
        ("scales", c_void_p),
        ("group", c_int64),
    )


class NativeLinear:
    """One packed weight. `args` is what C++ reads of it, valid as long as this object lives."""

    def __init__(
        self,
        kernels: Kernels,
        weight: Tensor,
        bias: Tensor | None,
        *,
        memory: PackedMemory,
        quantization: Quantization | None = None,
        tiles: Tiles | None = None,
    ) -> None:
        self._kernels = kernels
        self.num_out, self.num_in = weight.shape
        # bfloat16 is multiplied in pairs along the input, and four bits are unpacked two steps at a time: what is
        # missing at the end are features that are zero.
        self._padding = -self.num_in % (4 if quantization is not None and quantization.bits == 4 else 2)
        weight = F.pad(weight, (0, self._padding)).contiguous()
        self._scales: Tensor | None = None
        if quantization is None:
            depth = -weight.shape[1] % _TILE_DEPTH if tiles is not None else 0
            self._panels = _pack(kernels, F.pad(weight, (0, depth)) if depth else weight, memory)
        else:
            self._panels, self._scales = _pack_quantized(kernels, weight, memory, quantization)
        self._bias = None if bias is None else bias.contiguous()
        num_in = weight.shape[1]
        self.args = WeightArgs(
            panels=self._panels.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            num_in=num_in,
            num_out=self.num_out,
            kind=_kind(quantization, tiles),
            scales=None if self._scales is None else self._scales.data_ptr(),
            group=num_in if quantization is None else quantization.group or num_in,
        )
        self._address = ctypes.addressof(self.args)

    @property
    def num_bytes(self) -> int:
        """What a step reads of it: packed weights and scales."""
        scales = 0 if self._scales is None else self._scales.numel() * 4
        return self._panels.numel() * self._panels.element_size() + scales

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
    """See `LinearBackend`.

    Args:
        quantization: of every weight it is given; biases and products stay as they are.
        tiles: what multiplies weights of bfloat16 that are not quantised. Others are not for tiles.
    """

    name = "native"
    is_batch_invariant = True

    def __init__(
        self, kernels: Kernels, quantization: Quantization | None = None, *, tiles: Tiles | None = None
    ) -> None:
        assert tiles is None or (quantization is None and kernels.dtype == torch.bfloat16)
        self._kernels = kernels
        self._memory = PackedMemory()
        self.tiles = tiles
        self.is_on_tiles = tiles is not None
        self.quantization = quantization

    def make(self, weight: Tensor, bias: Tensor | None = None) -> NativeLinear:
        return NativeLinear(
            self._kernels, weight, bias, memory=self._memory, quantization=self.quantization, tiles=self.tiles
        )

    def for_head(self) -> NativeBackend:
        """Makes the head of the same model: eight bits where the layers have four, since every token is read off it."""
        return self if self.quantization is None else NativeBackend(self._kernels, INT8)


def _kind(quantization: Quantization | None, tiles: Tiles | None) -> int:
    if tiles is not None:
        return tiles
    return _KINDS[16 if quantization is None else quantization.bits]


def _pack(kernels: Kernels, weight: Tensor, memory: PackedMemory) -> Tensor:
    num_out, num_in = weight.shape
    panels = memory.empty(kernels.packed_size(num_in, num_out) * weight.element_size()).view(weight.dtype)
    kernels.pack_weight(weight.data_ptr(), num_in, num_out, panels.data_ptr(), torch.get_num_threads())
    return panels


def _pack_quantized(
    kernels: Kernels, weight: Tensor, memory: PackedMemory, quantization: Quantization
) -> tuple[Tensor, Tensor]:
    """Panels, uint8 `[panels, bytes]`, and scales, fp32 `[panels, groups, columns]`."""
    num_out, num_in = weight.shape
    columns = kernels.packed_size(2, 1) // 2
    pair = 1 if weight.dtype == torch.float32 else 2
    bits, group = quantization.bits, quantization.group or num_in
    num_panels = -(-num_out // columns)
    panels = memory.empty(num_panels * columns * num_in * bits // 8).view(num_panels, -1)
    scales = memory.empty(num_panels * -(-num_in // group) * columns * 4).view(torch.float32)
    scales = scales.view(num_panels, -1, columns)
    for lo in range(0, num_panels, _PANELS_AT_ONCE):
        hi = min(lo + _PANELS_AT_ONCE, num_panels)
        rows = weight[lo * columns : hi * columns]
        numbers, of_rows = quantize(F.pad(rows, (0, 0, 0, (hi - lo) * columns - rows.shape[0])), bits=bits, group=group)
        panels[lo:hi] = pack_numbers(numbers, bits=bits, lanes=columns // 2, pair=pair)
        scales[lo:hi] = pack_scales(of_rows, lanes=columns // 2)
    return panels, scales
