"""The Llama family (Llama, Mistral, Qwen2, Qwen3) over packed tokens: one lean module, no padding anywhere.

    ids [num_tokens] -> embed -> L x ( RMSNorm -> qkv -> (q/k norm) -> RoPE -> attention -> o
                                       RMSNorm -> gate_up -> SiLU * up -> down ) -> RMSNorm -> lm_head

Which tokens belong together only the attention backend knows. Numerics follow transformers: norms in fp32 and then
cast, fp32 cosines, softmax in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from engines.attention.backend import AttentionBackend
from engines.models.config import ModelConfig
from engines.models.rope import RopeTable, rotate

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


class LlamaModel:
    """Stateless apart from its weights: KV lives in the backend's region. Used by one thread at a time."""

    def __init__(self, config: ModelConfig, weights: LlamaWeights) -> None:
        self.config = config
        self._weights = weights
        self._rope = RopeTable(
            config.rope,
            head_dim=config.head_dim,
            max_positions=config.max_position_embeddings,
            dtype=weights.embed.dtype,
            device=str(weights.embed.device),
        )

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.embed.dtype

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        attention: AttentionBackend,
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
        hidden = F.embedding(ids, self._weights.embed)
        cos, sin = self._rope.at(positions)
        reported = 0
        for index, layer in enumerate(self._weights.layers):
            hidden = hidden + self._attend(index, layer, hidden, cos, sin, attention)
            hidden = hidden + self._mlp(layer, hidden)
            if on_layers is not None and (index + 1 == num_layers or index + 1 - reported >= group):
                on_layers(reported, index + 1)
                reported = index + 1
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits `[num_rows, vocab]` of hidden states `[num_rows, hidden]` from `forward`."""
        normed = rms_norm(hidden, self._weights.norm, self.config.rms_norm_eps)
        return F.linear(normed, self._weights.lm_head).float()

    def _attend(
        self, index: int, layer: LayerWeights, hidden: Tensor, cos: Tensor, sin: Tensor, attention: AttentionBackend
    ) -> Tensor:
        config = self.config
        normed = rms_norm(hidden, layer.input_norm, config.rms_norm_eps)
        qkv = F.linear(normed, layer.qkv, layer.qkv_bias)
        q, k, v = torch.split(qkv, [config.q_size, config.kv_size, config.kv_size], dim=-1)
        q = q.view(-1, config.num_heads, config.head_dim)
        k = k.view(-1, config.num_kv_heads, config.head_dim)
        v = v.view(-1, config.num_kv_heads, config.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q, layer.q_norm, config.rms_norm_eps)
            k = rms_norm(k, layer.k_norm, config.rms_norm_eps)
        attention.write_kv(index, rotate(k, cos, sin), v)
        out = attention.forward(index, rotate(q, cos, sin))
        return F.linear(out.reshape(-1, config.q_size), layer.o, layer.o_bias)

    def _mlp(self, layer: LayerWeights, hidden: Tensor) -> Tensor:
        normed = rms_norm(hidden, layer.post_norm, self.config.rms_norm_eps)
        gate, up = F.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, layer.down, layer.down_bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension: in fp32, cast back, then scaled."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
