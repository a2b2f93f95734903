"""Prompt logprobs against transformers, however the prompt is cut, and never out of the prefix cache."""

from __future__ import annotations

import struct

import pytest
import torch

from engines.params import SamplingParams
from engines.sequence import Sequence
from kvstore.state.entries import PromptLogprobs
from tests.checkpoints import reference_model
from tests.unit.engines.conftest import Reference
from tests.unit.engines.engine_loop import Loop, make_sequence, random_prompts

SCORED = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=4)


def scores_of(sequence: Sequence) -> PromptLogprobs:
    assert sequence.prompt_scores is not None
    return sequence.prompt_scores.whole()


def floats(packed: bytes) -> list[float]:
    return list(struct.unpack(f"{len(packed) // 4}f", packed))


def ints(packed: bytes) -> list[int]:
    return list(struct.unpack(f"{len(packed) // 4}i", packed))


@pytest.mark.parametrize("max_num_batched_tokens", [1, 7, 2048])
def test_prompt_logprobs_equal_transformers_for_any_chunking(reference: Reference, max_num_batched_tokens: int) -> None:
    prompts = [*random_prompts(2, seed=4), [9], list(range(3, 153))]
    sequences = [make_sequence(f"r{i}", prompt, SCORED) for i, prompt in enumerate(prompts)]
    plain = [make_sequence(f"p{i}", prompt) for i, prompt in enumerate(prompts)]

    Loop.load(reference.folder).generate(sequences + plain, max_num_batched_tokens=max_num_batched_tokens)

    model = reference_model(reference.folder)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        found = scores_of(sequence)
        targets = torch.tensor(prompt[1:])[:, None]
        chosen = expected.gather(1, targets)
        torch.testing.assert_close(torch.tensor(floats(found.logprobs)), chosen[:, 0], rtol=1e-4, atol=2e-4)
        assert ints(found.ranks) == ((expected > chosen).sum(-1) + 1).tolist()
        best = expected.topk(4, dim=-1)
        assert ints(found.top_ids) == best.indices.flatten().tolist()
        torch.testing.assert_close(
            torch.tensor(floats(found.top_logprobs)), best.values.flatten(), rtol=1e-4, atol=2e-4
        )
    assert all(sequence.prompt_scores is None for sequence in plain)


def test_a_prefix_hit_is_not_used_by_who_wants_prompt_logprobs(reference: Reference) -> None:
    prompt = list(range(3, 73))
    loop = Loop.load(reference.folder)
    cold, warm, plain = (
        make_sequence("a", prompt, SCORED),
        make_sequence("b", prompt, SCORED),
        make_sequence("c", prompt),
    )

    outputs = [loop.generate([sequence])[0] for sequence in (cold, warm, plain)]

    assert warm.num_cached_tokens == 0
    assert plain.num_cached_tokens > 0
    assert scores_of(cold) == scores_of(warm)
    assert outputs[0] == outputs[1] == outputs[2][:3]


def test_a_sequence_with_a_first_token_is_not_scored_again(reference: Reference) -> None:
    sequence = make_sequence("r", list(range(3, 40)), SCORED)
    sequence.output_token_ids = reference.generate(sequence.prompt_token_ids, 20)[:1]

    Loop.load(reference.folder).generate([sequence])

    assert sequence.prompt_scores is None
