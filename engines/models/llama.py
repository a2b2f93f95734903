"""The Llama family (Llama, Mistral, Qwen2, Qwen3) over packed tokens: one lean module, no padding anywhere.

    ids [num_tokens] -> embed -> L x ( RMSNorm -> qkv -> (q/k norm) -> RoPE -> attention -> o
                                       RMSNorm -> gate_up -> SiLU * up -> down ) -> RMSNorm -> lm_head

Which tokens belong together only the attention backend knows; which code multiplies, normalises and rotates was chosen
before (`Linear`, `RowOps`). Norms, cosines and softmax are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from engines.attention.backend import LayerAttention
from engines.attention.native_backend import NativeAttention
from engines.ext.library import Kernels
from engines.ext.row_ops import NativeRowOps
from engines.linear.backend import Linear, LinearBackend
from engines.linear.summed_linear import SummedLinear
from engines.linear.torch_linear import TorchBackend
from engines.models.config import ModelConfig
from engines.models.native_head import NativeHead
from engines.models.native_stack import NativeStack
from engines.models.rope import RopeTable
from engines.models.row_ops import RowOps, TorchRowOps
from engines.sampling.peaks import GroupMaxima, find_peaks

if TYPE_CHECKING:
    from engines.tensor_parallel.ranks import Shard

OnLayers = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. `qkv` is q, k, v stacked, `[q_size + 2 * kv_size, hidden]`; `gate_up` is gate, up stacked."""

    input_norm: Tensor
    qkv: Tensor
    o: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """A whole model; `lm_head` is `embed` itself where they are tied."""

    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Tensor


class _Layer:
    """One layer as it runs: its linears made, its norms as they are."""

    def __init__(self, weights: LayerWeights, linear: LinearBackend, shard: Shard | None) -> None:
        self.input_norm = weights.input_norm
        self.post_norm = weights.post_norm
        self.q_norm = weights.q_norm
        self.k_norm = weights.k_norm
        self.qkv: Linear = linear.make(weights.qkv, weights.qkv_bias)
        self.o: Linear = linear.make(weights.o, weights.o_bias)
        self.gate_up: Linear = linear.make(weights.gate_up, weights.gate_up_bias)
        self.down: Linear = linear.make(weights.down, weights.down_bias)
        if shard is not None:
            self.o, self.down = SummedLinear(self.o, shard.add_up), SummedLinear(self.down, shard.add_up)


class LlamaModel:
    """Stateless apart from its weights: KV lives in the backend's region. Used by one thread at a time.

    Args:
        linear: makes the linear layers; torch's unless told otherwise.
        head: makes the head; `linear` unless told otherwise.
        kernels: C++ for norms, SiLU and rotation, and for the attention of whoever runs this model; None is torch.
        is_deterministic: whoever runs this model gives it an attention whose order of summation is the sequence's.
        shard: `config` and `weights` are one rank's part, and this is which.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: LlamaWeights,
        *,
        linear: LinearBackend | None = None,
        head: LinearBackend | None = None,
        kernels: Kernels | None = None,
        is_deterministic: bool = False,
        shard: Shard | None = None,
    ) -> None:
        linear = linear or TorchBackend()
        self.config = config
        self.kernels = kernels
        self.is_deterministic = is_deterministic
        self.is_batch_invariant = linear.is_batch_invariant
        self.is_on_tiles = linear.is_on_tiles
        self._embed = weights.embed
        self._norm = weights.norm
        self._layers = tuple(_Layer(layer, linear, shard) for layer in weights.layers)
        num_kv_heads, rank = config.num_kv_heads, 0 if shard is None else shard.rank
        self.kv_heads = slice(rank * num_kv_heads, (rank + 1) * num_kv_heads)  # of those in the region
        self._lm_head: Linear = (head or linear).make(weights.lm_head)
        self._rows: RowOps = TorchRowOps() if kernels is None else NativeRowOps(kernels)
        self._rope = RopeTable(
            config.rope,
            head_dim=config.head_dim,
            max_positions=config.max_position_embeddings,
            dtype=weights.embed.dtype,
            device=str(weights.embed.device),
        )
        # From ids to hidden states, and from there to logits, in one call each, where linears and attention are C++.
        self.stack = NativeStack.of(config, weights.embed, self._layers, self._rope, kernels)
        self.head = NativeHead.of(weights.norm, self._lm_head, config.rms_norm_eps, kernels)

    @property
    def dtype(self) -> torch.dtype:
        return self._embed.dtype

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        attention: LayerAttention,
        *,
        on_layers: OnLayers | None = None,
        layer_group: int = 0,
    ) -> Tensor:
        """Hidden states `[num_tokens, hidden]` before the last norm; the KV of all tokens is written.

        Args:
            ids, positions: `[num_tokens]` int64; sequences one after another, as in the backend's metadata.
            on_layers: called with (lo, hi) as soon as the KV of layers [lo, hi) of this step is in the region.
            layer_group: layers per call of `on_layers`; 0 is all of them.
        """
        num_layers, group = self.config.num_layers, layer_group or self.config.num_layers
        rows, eps = self._rows, self.config.rms_norm_eps
        if self.stack is not None and isinstance(attention, NativeAttention):
            hidden = self.stack.empty_hidden(len(ids))
            for lo in range(0, num_layers, group):
                hi = min(lo + group, num_layers)
                self.stack.run(lo, hi, ids, positions, hidden, attention)
                if on_layers is not None:
                    on_layers(lo, hi)
            return hidden
        hidden = F.embedding(ids, self._embed)
        cos, sin = self._rope.at(positions)
        delta: Tensor | None = None
        reported = 0
        for index, layer in enumerate(self._layers):
            if delta is None:
                normed = rows.norm(hidden, layer.input_norm, eps)
            else:
                normed = rows.add_norm(hidden, delta, layer.input_norm, eps)
            attended = self._attend(index, layer, normed, cos, sin, attention)
            normed = rows.add_norm(hidden, attended, layer.post_norm, eps)
            delta = layer.down(rows.silu_mul(layer.gate_up(normed)))
            if on_layers is not None and (index + 1 == num_layers or index + 1 - reported >= group):
                on_layers(reported, index + 1)
                reported = index + 1
        return hidden if delta is None else hidden.add_(delta)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits `[num_rows, vocab]` of hidden states `[num_rows, hidden]` from `forward`."""
        return self._lm_head.wide(self._rows.norm(hidden, self._norm, self.config.rms_norm_eps))

    def logits_and_peaks(self, hidden: Tensor, *, with_maxima: bool = False) -> tuple[Tensor, list[int], list[int]]:
        """`logits`, and what `find_peaks` finds in them: in one pass, where norm and head are C++.

        Args:
            with_maxima: `maxima_of` is asked next.
        """
        if self.head is not None:
            return self.head.run(hidden, with_maxima=with_maxima)
        logits = self.logits(hidden)
        return logits, *find_peaks(logits, self.kernels)

    def maxima_of(self, logits: Tensor) -> GroupMaxima | None:
        """Of what `logits_and_peaks` gave last, unchanged, where the head has kept them."""
        return None if self.head is None else self.head.maxima_of(logits)

    def _attend(
        self, index: int, layer: _Layer, normed: Tensor, cos: Tensor, sin: Tensor, attention: LayerAttention
    ) -> Tensor:
        config, rows = self.config, self._rows
        num_heads, num_turned = config.num_heads, config.num_heads + config.num_kv_heads
        heads = layer.qkv(normed).view(-1, num_turned + config.num_kv_heads, config.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rows.rotate(rows.norm(heads[:, :num_heads], layer.q_norm, config.rms_norm_eps), cos, sin)
            k = rows.rotate(rows.norm(heads[:, num_heads:num_turned], layer.k_norm, config.rms_norm_eps), cos, sin)
        else:
            turned = rows.rotate(heads[:, :num_turned], cos, sin)
            q, k = turned[:, :num_heads], turned[:, num_heads:]
        attention.write_kv(index, k, heads[:, num_turned:])
        return layer.o(attention.forward(index, q).reshape(-1, config.q_size))
