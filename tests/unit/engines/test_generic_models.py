"""Models that transformers runs over our paged KV: the same tokens as `generate`, however the work is cut up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engines.errors import BadWeights, UnsupportedModel
from engines.factory import build_engine_model
from engines.models.generic import GenericModel
from engines.scheduler.plan import ScheduledSequence, StepPlan
from tests.checkpoints import make_checkpoint, reference_model
from tests.unit.engines.engine_loop import Loop, make_sequence, random_prompts

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "max_position_embeddings": 256}
MOE: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": SMALL,
    "gemma": {**SMALL, "head_dim": 24},
    "phi": {**SMALL, "partial_rotary_factor": 0.5},
    "gemma2": {**SMALL, "head_dim": 24, "sliding_window": 9},  # windows in every other layer, soft caps
    "gemma3_text": {**SMALL, "head_dim": 24, "sliding_window": 9},  # a rope per kind of layer
    "phi3": {**SMALL, "sliding_window": 11},
    "gpt_neox": SMALL,
    "opt": {**SMALL, "word_embed_proj_dim": 64, "ffn_dim": 96},
    "cohere2": {**SMALL, "head_dim": 16, "sliding_window": 9},
    "qwen3_moe": {**SMALL, **MOE, "head_dim": 16, "num_experts": 4},
    "gpt_oss": {**SMALL, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
    "deepseek_v2": {  # keys and values of different sizes
        **SMALL,
        **MOE,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family: str = request.param
    return make_checkpoint(tmp_path_factory.mktemp(family), family, **FAMILIES[family])


def generated(folder: Path, prompts: list[list[int]], num_tokens: int = 20) -> list[list[int]]:
    model = reference_model(folder)
    outputs = []
    for prompt in prompts:
        with torch.no_grad():
            ids = model.generate(
                torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        outputs.append(ids[0, len(prompt) :].tolist())
    return outputs


def test_greedy_tokens_equal_generate_in_chunks_batches_and_with_prefix_hits(folder: Path) -> None:
    shared = list(range(60, 84))
    prompts = [*random_prompts(3, seed=2, longest=50), [*shared, 7, 8], [*shared, 9]]
    expected = generated(folder, prompts)
    loop = Loop.load(folder)

    whole = loop.generate([make_sequence(f"w{i}", prompt) for i, prompt in enumerate(prompts)])
    again = [make_sequence(f"c{i}", prompt) for i, prompt in enumerate(prompts)]
    chunked = loop.generate(again, max_num_batched_tokens=13, max_num_seqs=3)

    assert whole == expected
    assert chunked == expected
    assert max(sequence.num_cached_tokens for sequence in again) >= 16
    assert loop.pool.num_used == 0


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "deepseek_v2"])
def test_prefill_then_copied_blocks_decode_to_the_same_tokens(tmp_path: Path, family: str) -> None:
    folder = make_checkpoint(tmp_path, family, **FAMILIES[family])
    prompts = random_prompts(3, seed=11, longest=40)
    source, target = Loop.load(folder), Loop.load(folder, seed=1)
    prefill, decode = source.prefill_scheduler(max_num_batched_tokens=25), target.decode_scheduler()
    sequences = [make_sequence(f"r{i}", prompt) for i, prompt in enumerate(prompts)]
    for sequence in sequences:
        prefill.add(sequence)
    while prefill.num_running or prefill.num_waiting:
        source.step(prefill)

    for sequence in sequences:
        blocks = target.pool.allocate(len(sequence.block_table))
        target.region.kv[blocks] = source.region.kv[sequence.block_table]
        sequence.block_table = blocks
        decode.add(sequence)
    target.run_to_end(decode, sequences)

    assert [sequence.output_token_ids for sequence in sequences] == generated(folder, prompts)


def test_layers_are_reported_in_groups_and_in_order(tmp_path: Path) -> None:
    loop = Loop.load(make_checkpoint(tmp_path, "gpt2", num_hidden_layers=3, max_position_embeddings=64))
    sequence = make_sequence("r", [5, 6, 7])
    sequence.block_table = loop.pool.allocate(1)
    groups: list[tuple[int, int]] = []

    plan = StepPlan(1, (ScheduledSequence(sequence, 0, 3),))
    loop.runner.run(plan, on_layers=lambda lo, hi: groups.append((lo, hi)), layer_group=2)

    assert groups == [(0, 2), (2, 3)]


def test_families_with_a_model_of_our_own_do_not_run_on_the_generic_one(llama_folder: Path) -> None:
    model, _ = build_engine_model(llama_folder, dtype=torch.float32)

    assert not isinstance(model, GenericModel)


@pytest.mark.parametrize(
    ("family", "shape", "words"),
    [
        ("mamba", {"num_hidden_layers": 2}, "state beside keys and values"),
        ("lfm2", {**SMALL, "layer_types": ["conv", "full_attention"]}, "attention is called for layer 1"),
        ("bloom", {"num_hidden_layers": 2}, "0 of 2 layers have attention"),
        ("falcon", {"num_hidden_layers": 2}, "attention cannot be exchanged"),
    ],
)
def test_what_keeps_more_than_keys_and_values_is_refused_by_name(
    tmp_path: Path, family: str, shape: dict[str, Any], words: str
) -> None:
    folder = make_checkpoint(tmp_path, family, **shape)

    with pytest.raises(UnsupportedModel, match=words):
        build_engine_model(folder, dtype=torch.float32)


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)

    with pytest.raises(UnsupportedModel, match="T5Config"):
        build_engine_model(tmp_path, dtype=torch.float32)


def test_a_window_that_the_layers_do_not_ask_for_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "olmo2", **SMALL)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 100}))

    with pytest.raises(UnsupportedModel, match="windows are"):
        build_engine_model(folder, dtype=torch.float32)


def test_attention_to_later_tokens_is_found_by_the_trial(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gemma3_text", **FAMILIES["gemma3_text"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_bidirectional_attention": True}))

    with pytest.raises(UnsupportedModel, match="Gemma3"):
        build_engine_model(folder, dtype=torch.float32)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt2", num_hidden_layers=2, max_position_embeddings=64)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 3}))

    with pytest.raises(BadWeights, match=r"transformer\.h\.2"):
        build_engine_model(folder, dtype=torch.float32)
