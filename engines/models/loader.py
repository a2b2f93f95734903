"""Weights of a Llama-type model from safetensors: every tensor checked by name and shape, fused, cast, copied.

Nothing is ever unpickled and no code of the folder runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from engines.errors import BadWeights
from engines.models.checkpoint import Checkpoint, short_list
from engines.models.config import ModelConfig
from engines.models.llama import LayerWeights, LlamaWeights
from engines.models.source import weights_digest as weights_digest

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (layers loaded, layers in all)

LOADABLE_DTYPES: Final = frozenset({"F32", "BF16", "F16"})
_EXPECTED_EXTRAS: Final = ("rotary_emb.inv_freq", "lm_head.weight")


def load_weights(
    folder: Path, config: ModelConfig, *, dtype: torch.dtype, device: str = "cpu", progress: Progress | None = None
) -> LlamaWeights:
    """Load all tensors that `config` asks for, as `dtype` on `device`. Blocks; `progress` is called per layer.

    Raises:
        BadWeights: a damaged file, or tensors missing, misshaped, or of a dtype that needs a scale; all are named.
    """
    with Checkpoint(folder) as checkpoint, torch.inference_mode():
        shapes = expected_shapes(config)
        _check_tensors(checkpoint, shapes)
        reader = _Reader(checkpoint, dtype, device)
        layers = []
        for index in range(config.num_layers):
            layers.append(_layer(reader, config, f"model.layers.{index}."))
            if progress is not None:
                progress(index + 1, config.num_layers)
        embed = reader.one("model.embed_tokens.weight")
        lm_head = embed if config.tie_word_embeddings else reader.one("lm_head.weight")
        if config.tie_word_embeddings and "lm_head.weight" in checkpoint.entries:
            _check_tied(checkpoint)
        return LlamaWeights(embed, tuple(layers), reader.one("model.norm.weight"), lm_head)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensor name -> (shape, the config fields that decide it)."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    heads = "num_attention_heads, head_dim, hidden_size"
    kv_heads = "num_key_value_heads, head_dim, hidden_size"
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "model.embed_tokens.weight": ((vocab, hidden), "vocab_size, hidden_size"),
        "model.norm.weight": ((hidden,), "hidden_size"),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = ((vocab, hidden), "vocab_size, hidden_size, tie_word_embeddings")
    for index in range(config.num_layers):
        base = f"model.layers.{index}."
        attention, mlp = f"{base}self_attn.", f"{base}mlp."
        shapes[f"{base}input_layernorm.weight"] = ((hidden,), "hidden_size")
        shapes[f"{base}post_attention_layernorm.weight"] = ((hidden,), "hidden_size")
        shapes[f"{attention}q_proj.weight"] = ((config.q_size, hidden), heads)
        shapes[f"{attention}k_proj.weight"] = ((config.kv_size, hidden), kv_heads)
        shapes[f"{attention}v_proj.weight"] = ((config.kv_size, hidden), kv_heads)
        shapes[f"{attention}o_proj.weight"] = ((hidden, config.q_size), heads)
        shapes[f"{mlp}gate_proj.weight"] = ((inner, hidden), "intermediate_size, hidden_size")
        shapes[f"{mlp}up_proj.weight"] = ((inner, hidden), "intermediate_size, hidden_size")
        shapes[f"{mlp}down_proj.weight"] = ((hidden, inner), "intermediate_size, hidden_size")
        if config.qkv_bias:
            shapes[f"{attention}q_proj.bias"] = ((config.q_size,), heads)
            shapes[f"{attention}k_proj.bias"] = ((config.kv_size,), kv_heads)
            shapes[f"{attention}v_proj.bias"] = ((config.kv_size,), kv_heads)
        if config.o_bias:
            shapes[f"{attention}o_proj.bias"] = ((hidden,), "attention_bias")
        if config.qk_norm:
            shapes[f"{attention}q_norm.weight"] = ((config.head_dim,), "head_dim")
            shapes[f"{attention}k_norm.weight"] = ((config.head_dim,), "head_dim")
        if config.mlp_bias:
            shapes[f"{mlp}gate_proj.bias"] = ((inner,), "mlp_bias")
            shapes[f"{mlp}up_proj.bias"] = ((inner,), "mlp_bias")
            shapes[f"{mlp}down_proj.bias"] = ((hidden,), "mlp_bias")
    return shapes


def _check_tensors(checkpoint: Checkpoint, shapes: dict[str, tuple[tuple[int, ...], str]]) -> None:
    found = checkpoint.entries
    if missing := sorted(shapes.keys() - found.keys()):
        raise BadWeights(
            checkpoint.folder, f"tensors are missing ({short_list(missing)})", "Expected all that config.json asks for."
        )
    wrong = [
        f"{name} is {list(found[name].shape)}, expected {list(shape)} by {fields}"
        for name, (shape, fields) in shapes.items()
        if found[name].shape != shape
    ]
    if wrong:
        raise BadWeights(
            checkpoint.folder, f"shapes do not fit ({short_list(wrong)})", "Use the config.json of these weights."
        )
    odd = [f"{name} is {found[name].dtype}" for name in shapes if found[name].dtype not in LOADABLE_DTYPES]
    if odd:
        raise BadWeights(
            checkpoint.folder,
            f"dtypes without a known scale ({short_list(odd)})",
            f"Expected {', '.join(sorted(LOADABLE_DTYPES))}.",
        )
    extra = sorted(name for name in found.keys() - shapes.keys() if not name.endswith(_EXPECTED_EXTRAS))
    if any(name.endswith(".bias") for name in extra):
        raise BadWeights(
            checkpoint.folder,
            f"biases that config.json does not mention ({short_list(extra)})",
            "Without them the text would be wrong; check `attention_bias` and `mlp_bias`.",
        )
    if extra:
        logger.warning("%s: tensors that the model does not use (%s)", checkpoint.folder, short_list(extra))


def _check_tied(checkpoint: Checkpoint) -> None:
    """Tied weights may be saved twice; if they differ, either the flag or the file is wrong."""
    if not torch.equal(checkpoint.take("lm_head.weight"), checkpoint.take("model.embed_tokens.weight")):
        raise BadWeights(
            checkpoint.path_of("lm_head.weight"),
            "lm_head.weight differs from model.embed_tokens.weight, but `tie_word_embeddings` is true",
            "Expected the same numbers, or `tie_word_embeddings: false` in config.json.",
        )


class _Reader:
    """Copies tensors out of the mapped files, in the engine's dtype."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device

    def one(self, name: str) -> Tensor:
        return self._checkpoint.take(name).to(device=self._device, dtype=self._dtype, copy=True)

    def stacked(self, *names: str) -> Tensor:
        """Tensors one below the other, so that one matrix product does for all."""
        return torch.cat([self.one(name) for name in names])


def _layer(reader: _Reader, config: ModelConfig, base: str) -> LayerWeights:
    q, k, v, o = (f"{base}self_attn.{part}_proj" for part in ("q", "k", "v", "o"))
    gate, up, down = (f"{base}mlp.{part}_proj" for part in ("gate", "up", "down"))
    return LayerWeights(
        input_norm=reader.one(f"{base}input_layernorm.weight"),
        qkv=reader.stacked(f"{q}.weight", f"{k}.weight", f"{v}.weight"),
        o=reader.one(f"{o}.weight"),
        post_norm=reader.one(f"{base}post_attention_layernorm.weight"),
        gate_up=reader.stacked(f"{gate}.weight", f"{up}.weight"),
        down=reader.one(f"{down}.weight"),
        qkv_bias=reader.stacked(f"{q}.bias", f"{k}.bias", f"{v}.bias") if config.qkv_bias else None,
        o_bias=reader.one(f"{o}.bias") if config.o_bias else None,
        gate_up_bias=reader.stacked(f"{gate}.bias", f"{up}.bias") if config.mlp_bias else None,
        down_bias=reader.one(f"{down}.bias") if config.mlp_bias else None,
        q_norm=reader.one(f"{base}self_attn.q_norm.weight") if config.qk_norm else None,
        k_norm=reader.one(f"{base}self_attn.k_norm.weight") if config.qk_norm else None,
    )
