from __future__ import annotations

from typing import Any

import pytest

from engines.models.kv_shape import KVShapeError, kv_shape

LLAMA_70B: dict[str, Any] = {
    "num_hidden_layers": 80, "num_attention_heads": 64, "hidden_size": 8192, "torch_dtype": "float16"
}  # fmt: skip


def test_a_70b_without_grouped_queries_costs_2_62_megabytes_per_token() -> None:
    shape = kv_shape(LLAMA_70B)

    assert shape.bytes_per_token == 2_621_440
    assert 2000 * shape.bytes_per_token == 5_242_880_000


def test_eight_kv_heads_cost_an_eighth() -> None:
    assert kv_shape({**LLAMA_70B, "num_key_value_heads": 8}).bytes_per_token == 327_680


@pytest.mark.parametrize(
    ("family", "config", "num_bytes"),
    [
        ("gpt-2", {"n_layer": 12, "n_head": 12, "n_embd": 768}, 2 * 12 * 768 * 2),
        ("falcon-7b", {"num_hidden_layers": 32, "num_attention_heads": 71, "hidden_size": 4544, "multi_query": True},
         2 * 32 * 64 * 2),
        ("qwen3, head_dim of its own", {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
         "hidden_size": 1024, "head_dim": 128, "dtype": "bfloat16"}, 2 * 28 * 8 * 128 * 2),
        ("gemma3, nested", {"torch_dtype": "bfloat16", "text_config": {"num_hidden_layers": 34, "head_dim": 256,
         "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 2560}}, 2 * 34 * 4 * 256 * 2),
        ("deepseek-v3, latent", {"num_hidden_layers": 61, "num_attention_heads": 128, "hidden_size": 7168,
         "kv_lora_rank": 512, "qk_rope_head_dim": 64, "torch_dtype": "bfloat16"}, 61 * 576 * 2),
        ("hybrid, every fourth layer attends", {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
         "layer_types": ["linear_attention"] * 3 + ["full_attention"]}, 2 * 1 * 2 * 256 * 2),
    ],
)  # fmt: skip
def test_every_family_is_read(family: str, config: dict[str, Any], num_bytes: int) -> None:
    assert kv_shape(config).bytes_per_token == num_bytes, family


def test_the_dtype_of_the_cache_may_be_another() -> None:
    assert kv_shape(LLAMA_70B, dtype="fp8").bytes_per_token == 1_310_720


@pytest.mark.parametrize("config", [{}, {**LLAMA_70B, "num_attention_heads": 0}, {**LLAMA_70B, "hidden_size": "8k"}])
def test_a_config_that_does_not_say_it_is_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises(KVShapeError, match=r"`(num_hidden_layers|num_attention_heads|hidden_size)`"):
        kv_shape(config)
