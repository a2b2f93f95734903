"""How many bytes of KV a token costs, from any Hugging Face config.json; also for models that no engine here runs.

Lenient on purpose: the names of all families are known, what is not needed is not read. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

DTYPE_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1}
_CACHING_LAYERS: Final = ("full_attention", "sliding_attention", "chunked_attention", "attention")


class KVShapeError(ValueError):
    """The config does not say what a token of KV is. `name` is the field that is missing or wrong."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"config.json: {problem}. Expected the config of a decoder model with `{name}`.")
        self.name = name


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token leaves in the cache.

    Attributes:
        num_layers: layers that cache; of a hybrid model only those with attention.
        num_kv_heads, head_dim: of each such layer; a latent cache (MLA) is one head of the latent's width.
        num_tensors: 2 for keys and values, 1 for a latent that serves as both.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    num_tensors: int = 2

    @property
    def bytes_per_token(self) -> int:
        return self.num_tensors * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


def kv_shape(config: Mapping[str, Any], *, dtype: str | None = None) -> KVShape:
    """The shape that `config` (a parsed config.json) describes.

    Args:
        dtype: of the cache; None takes the one of the weights, and float16 if the config names none that caches use.

    Raises:
        KVShapeError: a size is missing, or no positive integer.
    """
    text = config.get("text_config")
    fields = {**config, **text} if isinstance(text, Mapping) else dict(config)
    named = str(fields.get("torch_dtype") or fields.get("dtype") or "").removeprefix("torch.")
    chosen = dtype or (named if named in DTYPE_BYTES else "float16")
    num_layers = _num_layers(fields)
    if fields.get("kv_lora_rank"):
        latent = _count(fields, "kv_lora_rank") + _count(fields, "qk_rope_head_dim")
        return KVShape(num_layers, 1, latent, chosen, num_tensors=1)
    num_heads = _count(fields, "num_attention_heads", "n_head", "num_heads", "n_heads")
    if fields.get("head_dim"):
        head_dim = _count(fields, "head_dim")
    else:
        head_dim = _count(fields, "hidden_size", "n_embd", "d_model") // num_heads
    if fields.get("multi_query") and not fields.get("new_decoder_architecture"):
        num_kv_heads = 1  # Falcon, StarCoder
    elif any(fields.get(name) for name in ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")):
        num_kv_heads = _count(fields, "num_key_value_heads", "num_kv_heads", "multi_query_group_num")
    else:
        num_kv_heads = num_heads
    return KVShape(num_layers, num_kv_heads, head_dim, chosen)


def _num_layers(fields: Mapping[str, Any]) -> int:
    kinds = fields.get("layer_types")
    if isinstance(kinds, list) and kinds:
        return sum(kind in _CACHING_LAYERS for kind in kinds)
    return _count(fields, "num_hidden_layers", "n_layer", "num_layers", "n_layers")


def _count(fields: Mapping[str, Any], *names: str) -> int:
    """The first of these fields that is there."""
    for name in names:
        value = fields.get(name)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise KVShapeError(name, f"`{name}` is {value!r}")
        return value
    raise KVShapeError(names[0], f"none of {', '.join(names)} is there")
