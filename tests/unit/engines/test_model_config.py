"""config.json: what is read, what is refused, and that the message says which field."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines.errors import BadModelConfig, ModelError, UnsupportedModel
from engines.models import ModelConfig, RopeConfig

GOOD: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}


def read(folder: Path, generation: dict[str, Any] | None = None, **fields: Any) -> ModelConfig:
    raw = {name: value for name, value in {**GOOD, **fields}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_folder(folder)


def test_head_dim_is_derived_or_explicit(tmp_path: Path) -> None:
    assert read(tmp_path).head_dim == 16
    assert read(tmp_path, head_dim=32).head_dim == 32


def test_families_have_their_biases_and_norms(tmp_path: Path) -> None:
    qwen2 = read(tmp_path, architectures=["Qwen2ForCausalLM"])
    qwen3 = read(tmp_path, architectures=["Qwen3ForCausalLM"])
    llama = read(tmp_path, attention_bias=True, mlp_bias=True)

    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm) == (False, False, True)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)


def test_old_and_new_spelling_of_rope_say_the_same(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = read(tmp_path, rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    new = read(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})

    assert old.rope == new.rope == RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 64)
    assert read(tmp_path).rope == RopeConfig("default", 10_000.0)


def test_all_end_tokens_of_generation_config_count(tmp_path: Path) -> None:
    assert read(tmp_path).eos_token_ids == (2,)
    assert read(tmp_path, generation={"eos_token_id": [2, 7]}).eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32, "use_sliding_window": False}, (None, None)),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (None, None)),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 128}, (None, None)),  # as wide as the context
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 32}, (32, 32)),
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 32}, (None, None)),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32, "use_sliding_window": True}, (None, None)),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "sliding_window": 32,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            (None, 32),
        ),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 32,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (32, None),
        ),
    ],
)
def test_each_layer_has_the_window_that_transformers_gives_it(
    tmp_path: Path, fields: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert read(tmp_path, num_hidden_layers=2, **fields).windows == windows


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"vocab_size": "absent"}, "vocab_size"),
        ({"vocab_size": "100"}, "vocab_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"architectures": "absent"}, "architectures"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": 100}, "eos_token_id"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 4.0}}, "low_freq_factor"),
    ],
)
def test_bad_field_is_refused_by_name(tmp_path: Path, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(BadModelConfig) as caught:
        read(tmp_path, **fields)

    assert caught.value.field == field
    assert field in str(caught.value)
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "supported"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}}, "modeling_x.py"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_other_kinds_of_models_are_refused_by_name(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        read(tmp_path, **fields)


ODD_VALUES = [None, -1, 0, 10**30, 1.5, float("nan"), "x", True, [], [1], ["x", None], {}, {"a": 1}, {"type": []}]


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
def test_any_value_in_any_field_is_read_or_refused_by_a_model_error(tmp_path: Path, architecture: str) -> None:
    extra = ["head_dim", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window"]
    extra += ["layer_types", "partial_rotary_factor", "auto_map", "quantization_config", "hidden_act", "num_experts"]
    for field in [*GOOD, *extra]:
        for value in ODD_VALUES:
            with contextlib.suppress(ModelError):
                read(tmp_path, **{"architectures": [architecture], field: value})


def test_front_and_planner_get_schedulers_and_configs_without_torch() -> None:
    modules = "engines.scheduler, engines.models, engines.errors, engines.attention, engines.sampling"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_config_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)

    with pytest.raises(BadModelConfig, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)
