"""From token ids to hidden states in one C++ call (cpp/stack.h), where linears and attention are C++ too.

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
from engines.models.rope import RopeTable


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
        ("num_layers", c_int64),
        ("hidden_size", c_int64),
        ("head_dim", c_int64),
        ("vocab_size", c_int64),
        ("num_positions", c_int64),
        ("eps", c_float),
        ("embed", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
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
    """Holds the addresses of the weights and keeps them alive, and room for the largest step so far.

    Args:
        embed: `[vocab_size, hidden_size]`, contiguous.
    """

    def __init__(
        self, config: ModelConfig, embed: Tensor, layers: Sequence[StackLayer], rope: RopeTable, kernels: Kernels
    ) -> None:
        assert embed.is_contiguous() and rope.cos.is_contiguous() and rope.sin.is_contiguous()
        self._kernels = kernels
        self._kept = (embed, layers, rope)
        self._hidden_size = config.hidden_size
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
            num_layers=len(layers),
            hidden_size=config.hidden_size,
            head_dim=config.head_dim,
            vocab_size=embed.shape[0],
            num_positions=rope.cos.shape[0],
            eps=config.rms_norm_eps,
            embed=embed.data_ptr(),
            cos=rope.cos.data_ptr(),
            sin=rope.sin.data_ptr(),
            normed_stride=strides[0],
            attended_stride=strides[1],
            inner_stride=strides[2],
        )
        self._address = ctypes.addressof(self._args)
        self._room: list[Tensor] = []
        self._num_rows = 0

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        embed: Tensor,
        layers: Sequence[StackLayer],
        rope: RopeTable,
        kernels: Kernels | None,
    ) -> NativeStack | None:
        """None where a part of the layers is not C++: then they are called part by part."""
        if kernels is None or not layers or config.head_dim not in HEAD_DIMS:
            return None
        linears = [linear for layer in layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        if not all(isinstance(linear, NativeLinear) and linear.args.num_in == linear.num_in for linear in linears):
            return None
        return cls(config, embed, layers, rope, kernels)

    def empty_hidden(self, num_tokens: int) -> Tensor:
        """Room for the hidden states of a step."""
        return torch.empty((num_tokens, self._hidden_size), dtype=self._kernels.dtype)

    def run(self, lo: int, hi: int, ids: Tensor, positions: Tensor, hidden: Tensor, attention: NativeAttention) -> None:
        """Layers [lo, hi) of the step that `attention` was told of; their KV is then in the region. Blocks.

        Args:
            ids, positions: `[num_tokens]` int64, contiguous.
            hidden: `[num_tokens, hidden_size]`; written first where `lo` is 0, whole only after the last layer.

        Raises:
            IndexError: an id or a position is beyond the model's tables. Nothing was computed.
        """
        num_tokens = ids.shape[0]
        assert ids.is_contiguous() and positions.is_contiguous() and hidden.is_contiguous()
        if lo == 0 and num_tokens > self._num_rows:
            self._make_room(num_tokens)
        failed = self._kernels.run_layers(
            self._address, attention.step_address, lo, hi, ids.data_ptr(), positions.data_ptr(), hidden.data_ptr()
        )
        if failed:
            raise IndexError(
                f"index out of range: a token id or a position of the step. Expected ids below "
                f"{self._args.vocab_size} and positions below {self._args.num_positions}"
            )

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
