"""One rank's part of a model: which rows and columns of each weight it holds."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engines.errors import DeviceUnavailable
from engines.models.config import ModelConfig
from engines.models.llama import LayerWeights, LlamaWeights


def check_divisible(config: ModelConfig, num_ranks: int) -> None:
    """Raises DeviceUnavailable: the model cannot be cut into so many equal parts."""
    sizes = {
        "num_key_value_heads": config.num_kv_heads,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
    }
    for field, size in sizes.items():
        if size % num_ranks:
            raise DeviceUnavailable(
                asked=f"tensor_parallel_size={num_ranks}",
                why=f"{field}={size} of config.json is not a multiple of it",
                hint="Expected a number of ranks that divides all of "
                + ", ".join(f"{name}={value}" for name, value in sizes.items()),
            )
    if any(config.windows):
        raise DeviceUnavailable(
            asked=f"tensor_parallel_size={num_ranks}",
            why="the model has sliding windows",
            hint="Serve it with `tensor_parallel_size: 1`.",
        )


def shard_config(config: ModelConfig, num_ranks: int) -> ModelConfig:
    """The config of one rank's layers; what is not cut keeps its size."""
    return replace(
        config,
        num_heads=config.num_heads // num_ranks,
        num_kv_heads=config.num_kv_heads // num_ranks,
        intermediate_size=config.intermediate_size // num_ranks,
    )


def shard_weights(weights: LlamaWeights, config: ModelConfig, rank: int, num_ranks: int) -> LlamaWeights:
    """Copies of one rank's slices. Embedding, norms and head are whole; biases of sums are rank 0's alone.

    Args:
        config: of the whole model.
    """
    layers = tuple(_shard_layer(layer, config, rank, num_ranks) for layer in weights.layers)
    return LlamaWeights(weights.embed, layers, weights.norm, weights.lm_head)


def _shard_layer(layer: LayerWeights, config: ModelConfig, rank: int, num_ranks: int) -> LayerWeights:
    qkv_sizes = (config.q_size, config.kv_size, config.kv_size)
    inner_sizes = (config.intermediate_size, config.intermediate_size)
    is_first = rank == 0
    return LayerWeights(
        input_norm=layer.input_norm,
        qkv=_rows(layer.qkv, qkv_sizes, rank, num_ranks),
        o=_columns(layer.o, rank, num_ranks),
        post_norm=layer.post_norm,
        gate_up=_rows(layer.gate_up, inner_sizes, rank, num_ranks),
        down=_columns(layer.down, rank, num_ranks),
        qkv_bias=None if layer.qkv_bias is None else _rows(layer.qkv_bias, qkv_sizes, rank, num_ranks),
        o_bias=layer.o_bias if is_first else None,
        gate_up_bias=None if layer.gate_up_bias is None else _rows(layer.gate_up_bias, inner_sizes, rank, num_ranks),
        down_bias=layer.down_bias if is_first else None,
        q_norm=layer.q_norm,
        k_norm=layer.k_norm,
    )


def _rows(stacked: Tensor, sizes: tuple[int, ...], rank: int, num_ranks: int) -> Tensor:
    """The rank's rows of each of the parts that are stacked, stacked again."""
    parts = torch.split(stacked, list(sizes))
    return torch.cat([part.chunk(num_ranks)[rank] for part in parts]).contiguous()


def _columns(weight: Tensor, rank: int, num_ranks: int) -> Tensor:
    return weight.chunk(num_ranks, dim=1)[rank].contiguous()
