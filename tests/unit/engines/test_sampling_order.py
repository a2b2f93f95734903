"""The order of operations before the choice, against transformers' processors in their order; and the masks."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from engines.params import SamplingParams
from engines.sampling.adjust import adjust_logits
from engines.sampling.row import SamplingRow
from engines.sampling.sampler import Sampler

VOCAB, EOS = 300, 2
NEVER = float("-inf")


def random_logits(num_rows: int, seed: int) -> Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def adjusted(logits: Tensor, params: SamplingParams, *, prompt: list[int], output: list[int]) -> Tensor:
    changed = logits.clone()
    adjust_logits(changed, {0: SamplingRow(params, 0, 0, prompt, output)}, (EOS,))
    return changed


def processors(params: dict[str, Any], num_prompt: int) -> LogitsProcessorList:
    """As `GenerationMixin._get_logits_processor` puts them: bias, repetition, bad words, minimum of new tokens."""
    found: list[LogitsProcessor] = []
    if bias := params.get("logit_bias"):
        found.append(SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]))
    if penalty := params.get("repetition_penalty"):
        found.append(RepetitionPenaltyLogitsProcessor(penalty))
    if words := params.get("bad_word_ids"):
        found.append(NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=EOS))
    if minimum := params.get("min_tokens"):
        found.append(MinNewTokensLengthLogitsProcessor(num_prompt, minimum, torch.tensor([EOS])))
    return LogitsProcessorList(found)


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {5: 7.5, 9: -100.0, EOS: 40.0}},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"logit_bias": {7: 11.0, 40: -9.0}, "repetition_penalty": 1.4},
        {"min_tokens": 9},
        {"min_tokens": 3},
        {"min_tokens": 9, "logit_bias": {EOS: 100.0}, "repetition_penalty": 1.2},
        {"bad_word_ids": ((11,), (7, 40), (40, 12), (9, 7, 40, 13))},
        {"bad_word_ids": ((11,), (40, 12)), "logit_bias": {11: 100.0, 12: 100.0}, "repetition_penalty": 1.3},
    ],
)
def test_bias_penalty_and_masks_apply_in_the_order_of_transformers(params: dict[str, Any]) -> None:
    prompt, output = [1, 40, 7, EOS], [9, 9, 7, 40]
    logits = random_logits(1, 3)

    expected = processors(params, len(prompt))(torch.tensor([prompt + output]), logits.clone())

    ours = adjusted(logits, SamplingParams(**params), prompt=prompt, output=output)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        # bias comes before the repetition penalty: (4 + 6) / 2, not 4 / 2 + 6
        ({"logit_bias": {7: 6.0}, "repetition_penalty": 2.0}, 5.0),
        # the repetition penalty before frequency and presence: 4 / 2 - 2 * 0.5 - 0.25
        ({"repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 0.25}, 0.75),
        ({"logit_bias": {7: 6.0}, "repetition_penalty": 2.0, "frequency_penalty": 0.5}, 4.0),
        # a mask is final, whatever was added
        ({"logit_bias": {7: 100.0}, "bad_word_ids": ((7,),)}, NEVER),
        ({"logit_bias": {7: 100.0}, "allowed_token_ids": (8,)}, NEVER),
        ({"logit_bias": {7: 100.0}, "stop_token_ids": (7,), "min_tokens": 3}, NEVER),
        ({"logit_bias": {7: 100.0}, "stop_token_ids": (7,), "min_tokens": 2}, 104.0),
    ],
)
def test_each_operation_sees_what_the_one_before_left(params: dict[str, Any], expected: float) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 4.0

    ours = adjusted(logits, SamplingParams(**params), prompt=[1], output=[7, 7])

    assert float(ours[0, 7]) == pytest.approx(expected)


def test_only_allowed_tokens_are_chosen_and_keep_their_logits() -> None:
    logits = random_logits(1, 5)

    ours = adjusted(logits, SamplingParams(allowed_token_ids=(4, 200, 10**6)), prompt=[1], output=[])

    assert (ours > NEVER).nonzero()[:, 1].tolist() == [4, 200]
    assert torch.equal(ours[0, [4, 200]], logits[0, [4, 200]])


@pytest.mark.parametrize(
    ("params", "left"),
    [
        ({"allowed_token_ids": (7,), "bad_word_ids": ((7,),)}, [7]),
        ({"allowed_token_ids": (EOS,), "min_tokens": 5}, [EOS]),
        ({"allowed_token_ids": (7, EOS), "min_tokens": 5, "bad_word_ids": ((7,),)}, [EOS]),
        ({"allowed_token_ids": (10**6,), "bad_word_ids": tuple((i,) for i in range(VOCAB - 1))}, [VOCAB - 1]),
    ],
)
def test_a_mask_that_would_leave_nothing_gives_way(params: dict[str, Any], left: list[int]) -> None:
    ours = adjusted(random_logits(1, 6), SamplingParams(**params), prompt=[1], output=[3])

    assert (ours > NEVER).nonzero()[:, 1].tolist() == left


def test_masks_of_one_row_leave_the_others_alone() -> None:
    rng = random.Random(2)
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, allowed_token_ids=(5, 6, 70)),
        SamplingParams(temperature=0.0, bad_word_ids=((5,), (9, 6))),
        SamplingParams(temperature=0.0, min_tokens=4, stop_token_ids=(8,)),
        SamplingParams(temperature=1.0, allowed_token_ids=(5, 6, 70), bad_word_ids=((9, 70),)),
    ]
    rows = [SamplingRow(rng.choice(kinds), i, 0, [1], rng.choices(range(12), k=rng.randrange(5))) for i in range(48)]
    logits = random_logits(48, 7)
    sampler = Sampler((EOS,))

    together = sampler.sample(logits, rows)[0]

    assert together == [sampler.sample(logits[i : i + 1], [row])[0][0] for i, row in enumerate(rows)]
