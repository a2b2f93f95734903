"""The packed, paged model against transformers, fp32: logits, and greedy tokens however the work is cut up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.attention.backend import AttentionMetadata, AttentionRow
from engines.attention.torch_backend import TorchAttention
from engines.factory import build_engine_model
from engines.scheduler.plan import ScheduledSequence, StepPlan
from tests.checkpoints import make_checkpoint, reference_model
from tests.unit.engines.conftest import Reference
from tests.unit.engines.engine_loop import Loop, make_sequence, random_prompts

BLOCK_SIZE = 8


def packed_logits(folder: Path, prompts: list[list[int]], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Logits of every position of every prompt, all prompts in one packed batch."""
    model, config = build_engine_model(folder, dtype=dtype)
    shape = (128, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    attention = TorchAttention(torch.full(shape, float("nan"), dtype=dtype))
    tables = [list(range(i, 128, len(prompts))) for i in range(len(prompts))]
    rows = tuple(AttentionRow(0, len(ids), table) for ids, table in zip(prompts, tables, strict=True))
    slots = [
        table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
        for ids, table in zip(prompts, tables, strict=True)
        for p in range(len(ids))
    ]
    attention.begin_step(AttentionMetadata(rows, torch.tensor(slots)))
    ids = torch.tensor(np.concatenate(prompts))
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
    logits = model.logits(model.forward(ids, positions, attention))
    return list(logits.split([len(prompt) for prompt in prompts]))


def assert_logits_equal(folder: Path, prompts: list[list[int]]) -> None:
    reference = reference_model(folder)
    for prompt, logits in zip(prompts, packed_logits(folder, prompts), strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-4)


def test_packed_logits_equal_those_of_transformers(reference: Reference) -> None:
    assert_logits_equal(reference.folder, random_prompts(5))


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 24}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 4.0}}),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 500.0,
                    "factor": 8.0,
                    "original_max_position_embeddings": 64,
                    "beta_fast": 8.0,
                    "beta_slow": 2.0,
                    "mscale": 0.7,
                    "mscale_all_dim": 1.3,
                    "truncate": False,
                }
            },
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
    ],
)
def test_variants_of_a_family_equal_transformers(tmp_path: Path, family: str, shape: dict[str, Any]) -> None:
    folder = make_checkpoint(tmp_path, family, **shape)

    assert_logits_equal(folder, [random_prompts(1, seed=3)[0], list(range(3, 153))])


def test_sharded_checkpoint_loads_like_a_single_file(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1

    assert_logits_equal(folder, random_prompts(2))


def test_bfloat16_logits_are_near_those_of_transformers(reference: Reference) -> None:
    prompts = random_prompts(3)
    model = reference_model(reference.folder, torch.bfloat16)

    for prompt, logits in zip(prompts, packed_logits(reference.folder, prompts, torch.bfloat16), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0].float()
        error = (logits - expected).norm() / expected.norm()
        assert error < 0.03, error


@pytest.mark.parametrize("max_num_batched_tokens", [7, 33, 2048])
def test_greedy_tokens_equal_generate_for_any_chunking(reference: Reference, max_num_batched_tokens: int) -> None:
    prompts = random_prompts(7)
    loop = Loop.load(reference.folder)

    outputs = loop.generate(
        [make_sequence(f"r{i}", prompt) for i, prompt in enumerate(prompts)],
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=4,
    )

    assert outputs == [reference.generate(prompt, 20) for prompt in prompts]
    assert loop.pool.num_used == 0


def test_long_context_is_exact_next_to_short_ones(reference: Reference) -> None:
    prompts = [[3 + (i * i + i // 7) % 256 for i in range(1300)], [5, 6, 7], [9] * 530]
    loop = Loop.load(reference.folder, num_blocks=300)

    outputs = loop.generate(
        [make_sequence(f"r{i}", prompt) for i, prompt in enumerate(prompts)], max_num_batched_tokens=400
    )

    assert outputs == [reference.generate(prompt, 20) for prompt in prompts]


def test_prefix_cache_hits_change_no_token(reference: Reference) -> None:
    shared = random_prompts(1, seed=5, longest=40)[0] + list(range(50, 90))
    prompts = [shared + tail for tail in ([], [7, 8], list(range(100, 120)))]
    loop = Loop.load(reference.folder)
    expected = [reference.generate(prompt, 20) for prompt in prompts]

    outputs = [loop.generate([make_sequence(f"r{i}", prompt)])[0] for i, prompt in enumerate(prompts)]
    again = make_sequence("again", prompts[0])
    outputs_again = loop.generate([again])[0]

    assert outputs == expected
    assert outputs_again == expected[0]
    assert again.num_cached_tokens >= len(shared) - BLOCK_SIZE


def test_recovered_sequence_goes_on_with_the_same_tokens(reference: Reference) -> None:
    prompt = random_prompts(1, seed=9)[0]
    expected = reference.generate(prompt, 20)
    sequence = make_sequence("r", prompt)
    sequence.output_token_ids = expected[:11]

    assert Loop.load(reference.folder).generate([sequence], max_num_batched_tokens=5) == [expected]


def test_prefill_then_copied_blocks_decode_to_the_same_tokens(reference: Reference) -> None:
    """What a hand-off does, without the wire: only whole blocks of the prompt's KV reach the other engine."""
    prompts = random_prompts(4, seed=11)
    source, target = Loop.load(reference.folder), Loop.load(reference.folder, seed=1)
    prefill, decode = source.prefill_scheduler(max_num_batched_tokens=25), target.decode_scheduler()
    sequences = [make_sequence(f"r{i}", prompt) for i, prompt in enumerate(prompts)]
    for sequence in sequences:
        prefill.add(sequence)
    while prefill.num_running or prefill.num_waiting:
        source.step(prefill)

    for sequence in sequences:
        num_tokens = sequence.num_computed_tokens
        assert num_tokens == len(sequence.prompt_token_ids)
        if num_tokens % BLOCK_SIZE:
            source.runner.zero_tail(sequence.block_table[-1], num_tokens % BLOCK_SIZE)
        blocks = target.pool.allocate(len(sequence.block_table))
        target.region.kv[blocks] = source.region.kv[sequence.block_table]
        assert not target.region.kv[blocks].isnan().any()
        sequence.block_table = blocks
        decode.add(sequence)
    target.run_to_end(decode, sequences)

    assert [s.output_token_ids for s in sequences] == [reference.generate(prompt, 20) for prompt in prompts]


def test_layers_are_reported_in_groups_and_in_order(llama_folder: Path) -> None:
    loop = Loop.load(llama_folder)
    scheduler = loop.decode_scheduler()
    scheduler.add(make_sequence("r", [5, 6, 7]))
    plan = scheduler.schedule(0.0)
    assert plan is not None
    groups: list[tuple[int, int]] = []

    loop.runner.run(plan, on_layers=lambda lo, hi: groups.append((lo, hi)), layer_group=2)
    loop.runner.run(plan, on_layers=lambda lo, hi: groups.append((lo, hi)))

    assert groups == [(0, 2), (2, 3), (0, 3)]


def test_sequence_without_samples_gets_its_kv_and_no_token(llama_folder: Path) -> None:
    loop = Loop.load(llama_folder)
    sequence = make_sequence("r", [5, 6, 7])
    sequence.num_samples, sequence.block_table = 0, loop.pool.allocate(1)

    result = loop.runner.run(StepPlan(1, (ScheduledSequence(sequence, 0, 3),)))

    assert [(item.sequence, item.token_ids) for item in result.sampled] == [(sequence, [])]
    assert not loop.region.kv[sequence.block_table[0], :, :, :, :3].isnan().any()
