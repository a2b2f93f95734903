"""All decoder layers of a step in one C++ call (cpp/stack.h), where their linears and the attention are C++ too.

Same bits as the layers called part by part: the parts are the same functions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from typing import Protocol

import torch
from torch import Tensor

from engines.attention.native_backend import NativeAttention
from engines.ext.library import HEAD_DIMS, Kernels
from engines.linear.backend import Linear
from engines.linear.native_linear import NativeLinear, WeightArgs
from engines.models.config import ModelConfig


class StackLayer(Protocol):
    """A layer as `LlamaModel` holds it."""

    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear


class _LayerArgs(ctypes.Structure):
    """`struct Layer` of cpp/stack.h, field by field."""

    _fields_ = (
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", WeightArgs),
        ("o", WeightArgs),
        ("gate_up", WeightArgs),
        ("down", WeightArgs),
    )


class _StackArgs(ctypes.Structure):
    """`struct Stack` of cpp/stack.h, field by field."""

    _fields_ = (
        ("layers", c_void_p),
        ("hidden_size", c_int64),
        ("head_dim", c_int64),
        ("eps", c_float),
        ("normed", c_void_p),
        ("qkv", c_void_p),
        ("attended", c_void_p),
        ("gate_up", c_void_p),
        ("inner", c_void_p),
        ("delta", c_void_p),
        ("normed_stride", c_int64),
        ("attended_stride", c_int64),
        ("inner_stride", c_int64),
    )


class NativeStack:
    """Holds the addresses of the weights, which `layers` keep alive, and room for the largest step so far."""

    def __init__(self, config: ModelConfig, layers: Sequence[StackLayer], kernels: Kernels) -> None:
        self._kernels = kernels
        self._layers = layers
        self._num_layers = len(layers)
        strides = [_stride(size, kernels.dtype) for size in (config.hidden_size, config.q_size, _inner(layers))]
        # Elements per token of normed, qkv, attended, gate_up, inner, delta, in the order of `_StackArgs`.
        self._widths = (
            strides[0],
            config.q_size + 2 * config.kv_size,
            strides[1],
            2 * _inner(layers),
            strides[2],
            config.hidden_size,
        )
        self._weights = (_LayerArgs * len(layers))(*(_layer_args(layer) for layer in layers))
        self._args = _StackArgs(
            layers=ctypes.addressof(self._weights),
            hidden_size=config.hidden_size,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            normed_stride=strides[0],
            attended_stride=strides[1],
            inner_stride=strides[2],
        )
        self._address = ctypes.addressof(self._args)
        self._room: list[Tensor] = []
        self._num_rows = 0

    @classmethod
    def of(cls, config: ModelConfig, layers: Sequence[StackLayer], kernels: Kernels | None) -> NativeStack | None:
        """None where a part of the layers is not C++: then they are called part by part."""
        if kernels is None or not layers or config.head_dim not in HEAD_DIMS:
            return None
        linears = [linear for layer in layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        if not all(isinstance(linear, NativeLinear) and linear.args.num_in == linear.num_in for linear in linears):
            return None
        return cls(config, layers, kernels)

    def run(self, lo: int, hi: int, hidden: Tensor, cos: Tensor, sin: Tensor, attention: NativeAttention) -> None:
        """Layers [lo, hi) of the step that `attention` was told of; their KV is then in the region. Blocks.

        Args:
            hidden: `[num_tokens, hidden_size]`, changed in place; whole only after the last layer.
            cos, sin: `[num_tokens, 1, head_dim]`, contiguous.
        """
        num_tokens = hidden.shape[0]
        assert hidden.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
        if lo == 0 and num_tokens > self._num_rows:
            self._make_room(num_tokens)
        self._kernels.run_layers(
            self._address, attention.step_address, lo, hi, hidden.data_ptr(), cos.data_ptr(), sin.data_ptr()
        )
        if hi == self._num_layers:
            hidden.add_(self._room[-1][:num_tokens])

    def _make_room(self, num_rows: int) -> None:
        self._room = [torch.empty((num_rows, width), dtype=self._kernels.dtype) for width in self._widths]
        self._num_rows = num_rows
        names = ("normed", "qkv", "attended", "gate_up", "inner", "delta")
        for name, tensor in zip(names, self._room, strict=True):
            setattr(self._args, name, tensor.data_ptr())


def _inner(layers: Sequence[StackLayer]) -> int:
    down = layers[0].down
    assert isinstance(down, NativeLinear)
    return down.num_in


def _stride(size: int, dtype: torch.dtype) -> int:
    """Elements from row to row. Rows that are KiB apart fall on the same lines of the first-level cache."""
    return size + 64 // dtype.itemsize if size * dtype.itemsize % 1024 == 0 else size


def _layer_args(layer: StackLayer) -> _LayerArgs:
    def weight(linear: Linear) -> WeightArgs:
        assert isinstance(linear, NativeLinear)
        return linear.args

    def norm(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    return _LayerArgs(
        norm(layer.input_norm),
        norm(layer.post_norm),
        norm(layer.q_norm),
        norm(layer.k_norm),
        weight(layer.qkv),
        weight(layer.o),
        weight(layer.gate_up),
        weight(layer.down),
    )
