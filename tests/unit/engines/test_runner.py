"""What the runner does apart from exact tokens: several choices, damaged KV, errors, block copies, shared memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engines.errors import DeviceUnavailable, ForwardFailed, NonFiniteLogits
from engines.factory import build_engine_model, choose_device, choose_dtype
from engines.kv_region import KVTensor
from engines.params import SamplingParams
from engines.runner import ModelRunner
from engines.scheduler.plan import ScheduledSequence, StepPlan
from engines.sequence import Sequence
from tests.unit.engines.engine_loop import Loop, make_sequence

SAMPLED = SamplingParams(temperature=1.0, max_tokens=12, logprobs=1)


def plan_of(*sequences: Sequence) -> StepPlan:
    items = (ScheduledSequence(s, s.num_computed_tokens, s.num_uncomputed_tokens) for s in sequences)
    return StepPlan(1, tuple(items))


def with_blocks(loop: Loop, sequence: Sequence) -> Sequence:
    sequence.block_table = loop.pool.allocate(-(-sequence.num_tokens // loop.block_size))
    return sequence


def test_choices_of_one_prompt_equal_those_sampled_alone(llama_folder: Path) -> None:
    loop = Loop.load(llama_folder)
    together = with_blocks(loop, make_sequence("r", [9, 8, 7], SAMPLED, seed=42))
    together.num_samples = 3
    (result,) = loop.runner.run(plan_of(together)).sampled

    alone = []
    for choice in range(3):
        sequence = with_blocks(loop, make_sequence("r", [9, 8, 7], SAMPLED, seed=42))
        sequence.choice = choice
        alone.append(loop.runner.run(plan_of(sequence)).sampled[0].token_ids[0])

    assert result.token_ids == alone
    assert result.logprobs is not None
    assert len(result.logprobs) == 3


def test_seeded_tokens_do_not_depend_on_the_batch(llama_folder: Path) -> None:
    prompts = [[5, 6, 7, 8], [30] * 20, list(range(3, 50))]
    loop = Loop.load(llama_folder)
    together = loop.generate([make_sequence(f"r{i}", p, SAMPLED, seed=i) for i, p in enumerate(prompts)])
    alone = [
        Loop.load(llama_folder).generate([make_sequence("x", p, SAMPLED, seed=i)], max_num_batched_tokens=6)[0]
        for i, p in enumerate(prompts)
    ]

    assert together == alone


def test_seeded_sequence_recovers_to_the_same_tokens(llama_folder: Path) -> None:
    params = changed(SAMPLED, frequency_penalty=0.4, repetition_penalty=1.2)
    whole = Loop.load(llama_folder).generate([make_sequence("r", [4, 5, 6], params, seed=9)])[0]
    recovered = make_sequence("r", [4, 5, 6], params, seed=9)
    recovered.output_token_ids = whole[:5]

    assert Loop.load(llama_folder).generate([recovered])[0] == whole


def changed(params: SamplingParams, **changes: float) -> SamplingParams:
    return SamplingParams(**{**{f: getattr(params, f) for f in params.__struct_fields__}, **changes})


def test_damaged_kv_is_never_sampled_from(llama_folder: Path) -> None:
    loop = Loop.load(llama_folder)
    sequence = with_blocks(loop, make_sequence("hurt", list(range(3, 23))))
    sequence.num_computed_tokens = 19  # but nothing was ever computed: its KV is NaN

    with pytest.raises(NonFiniteLogits, match="hurt") as caught:
        loop.runner.run(plan_of(sequence))
    assert caught.value.retryable


def test_error_of_torch_names_the_step(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop.load(llama_folder)

    def out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(loop.runner._model, "forward", out_of_memory)

    with pytest.raises(ForwardFailed, match="Step 1 over 3 tokens"):
        loop.runner.run(plan_of(with_blocks(loop, make_sequence("r", [5, 6, 7]))))


def test_id_beyond_the_vocabulary_fails_the_step_and_not_the_process(llama_folder: Path) -> None:
    loop = Loop.load(llama_folder)

    with pytest.raises(ForwardFailed, match="index"):
        loop.runner.run(plan_of(with_blocks(loop, make_sequence("r", [5, 10**6]))))


def test_copied_block_equals_its_source_and_a_zeroed_tail_is_zero(llama_folder: Path) -> None:
    loop = Loop.load(llama_folder)
    sequence = with_blocks(loop, make_sequence("r", list(range(3, 8))))
    loop.runner.run(plan_of(sequence))
    (source,), (copy,) = sequence.block_table, loop.pool.allocate(1)

    loop.runner.zero_tail(source, 5)
    loop.runner.copy_blocks([(source, copy)])

    assert torch.equal(loop.region.kv[source], loop.region.kv[copy])
    assert not loop.region.kv[copy, :, :, :, 5:].any()
    assert loop.region.kv[copy, :, :, :, :5].all()


def test_shared_region_and_tensor_are_the_same_bytes(llama_folder: Path) -> None:
    model, config = build_engine_model(llama_folder, dtype=torch.bfloat16)
    region = KVTensor.create(config, num_blocks=6, block_size=4, dtype=torch.bfloat16)
    runner = ModelRunner(model, region, device="cpu", dtype=torch.bfloat16)
    sequence = make_sequence("r", [5, 6, 7, 8])
    sequence.block_table = [3]
    runner.run(plan_of(sequence))

    block_bytes = KVTensor.bytes_per_block(config, 4, torch.bfloat16)
    assert region.shared.block_bytes == block_bytes
    in_memory = bytes(region.shared.buffer[3 * block_bytes : 4 * block_bytes])
    assert in_memory == region.kv[3].view(torch.uint8).numpy().tobytes()
    assert any(in_memory)
    assert not any(region.shared.buffer[: 3 * block_bytes])


def test_device_and_dtype_settings_are_honoured_or_refused() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_dtype("bfloat16", "cpu") is torch.bfloat16
    assert choose_dtype("auto", "cpu") in (torch.bfloat16, torch.float32)
    with pytest.raises(DeviceUnavailable, match="float16"):
        choose_dtype("float16", "cpu")
