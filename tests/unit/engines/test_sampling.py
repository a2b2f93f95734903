"""The sampler: same choice whatever the batch, exact truncation, penalties as documented."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from engines.params import SamplingParams
from engines.sampling import choose as choose_module
from engines.sampling.adjust import adjust_logits
from engines.sampling.choose import Filters, choose
from engines.sampling.randomness import uniforms
from engines.sampling.row import SamplingRow
from engines.sampling.sampler import Sampler

VOCAB = 500


def make_row(
    params: SamplingParams,
    *,
    seed: int = 0,
    choice: int = 0,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
) -> SamplingRow:
    return SamplingRow(params, seed, choice, prompt or [1], output or [])


def random_logits(num_rows: int, seed: int = 0, *, spread: float = 3.0, vocab: int = VOCAB) -> Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def sample(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    return Sampler((2,)).sample(logits, rows)[0]


def one_filter(
    num_rows: int, uniform: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> Filters:
    def full(value: float) -> Tensor:
        return torch.full((num_rows,), value, dtype=torch.float64)

    return Filters(full(temperature), torch.full((num_rows,), top_k), full(top_p), full(min_p), uniform)


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [17, 400]] = 5.0

    assert sample(logits, [make_row(SamplingParams(temperature=0.0))]) == [17]


def test_uniforms_depend_on_seed_choice_and_index_alone() -> None:
    counters = [(seed, choice, index) for seed in (0, 1, -5, 2**63 + 1) for choice in (0, 1) for index in range(50)]
    together = uniforms(counters)

    assert [uniforms([counter])[0] for counter in counters] == list(together)
    assert len(set(together.tolist())) == len(counters)
    assert ((together >= 0) & (together < 1)).all()


def test_uniforms_are_spread_evenly_and_unrelated() -> None:
    values = torch.from_numpy(uniforms([(7, 0, index) for index in range(20_000)]))
    other = torch.from_numpy(uniforms([(7, 1, index) for index in range(20_000)]))

    counts = torch.histc(values.float(), bins=20, min=0, max=1)
    assert (counts - 1000).abs().max() < 150
    assert abs(float(torch.corrcoef(torch.stack([values, other]))[0, 1])) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1])) < 0.03


def test_same_request_gives_the_same_token_in_any_batch_slot() -> None:
    logits = random_logits(40)
    rng = random.Random(1)
    rows = [
        make_row(
            SamplingParams(
                temperature=rng.choice([0.0, 0.7, 1.5]),
                top_k=rng.choice([0, 5, 100]),
                top_p=rng.choice([1.0, 0.8]),
                min_p=rng.choice([0.0, 0.05]),
                repetition_penalty=rng.choice([1.0, 1.3]),
                logprobs=rng.choice([None, 2]),
            ),
            seed=i,
            choice=i % 3,
            output=[5] * (i % 7),
        )
        for i in range(40)
    ]
    together = sample(logits, rows)
    order = list(range(40))
    rng.shuffle(order)

    assert [sample(logits[i : i + 1], [rows[i]])[0] for i in range(40)] == together
    assert sample(logits[order], [rows[i] for i in order]) == [together[i] for i in order]


@pytest.mark.parametrize("spread", [0.05, 1.0, 6.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0.0),
        (1, 1.0, 0.0),
        (20, 0.9, 0.0),
        (63, 1.0, 0.0),
        (64, 1.0, 0.0),
        (65, 0.5, 0.0),
        (0, 0.9, 0.0),
        (0, 1.0, 0.1),
    ],
)
def test_truncated_choice_equals_full_sort(
    monkeypatch: pytest.MonkeyPatch, spread: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(300, 3, spread=spread).bfloat16().float()  # many ties
    uniform = torch.from_numpy(uniforms([(i, 0, 0) for i in range(300)]))
    filters = one_filter(300, uniform, temperature=0.9, top_k=top_k, top_p=top_p, min_p=min_p)

    truncated = choose(logits, filters)
    monkeypatch.setattr(choose_module, "NUM_CANDIDATES", VOCAB)

    assert truncated.tolist() == choose(logits, filters).tolist()


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (10, 0.8, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2)])
def test_frequencies_follow_the_distribution_of_the_reference_processors(
    top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(1, 5, spread=1.5, vocab=100)
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.8)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    expected = processors(torch.zeros(1, 1, dtype=torch.long), logits.clone())[0].softmax(-1)
    num_draws = 20_000
    uniform = torch.from_numpy(uniforms([(1, 0, index) for index in range(num_draws)]))

    chosen = choose(
        logits.expand(num_draws, -1),
        one_filter(num_draws, uniform, temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p),
    )

    counts = torch.bincount(chosen, minlength=100)
    assert not counts[expected == 0].any()
    deviation = (counts - num_draws * expected).abs()
    assert bool((deviation <= 5 * (num_draws * expected).sqrt() + 1).all())


def test_repetition_penalty_equals_the_reference_over_prompt_and_output() -> None:
    logits = random_logits(1)
    ids = [3, 9, 9, 40, 7]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), logits.clone())

    row = make_row(SamplingParams(repetition_penalty=1.3), prompt=ids[:3], output=ids[3:])
    adjusted = logits.clone()
    adjust_logits(adjusted, {0: row}, (2,))

    torch.testing.assert_close(adjusted, expected)


def test_frequency_and_presence_penalties_count_the_output_only() -> None:
    logits = torch.zeros(2, VOCAB)
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)

    adjust_logits(logits, {1: make_row(params, prompt=[8], output=[4, 4, 6])}, (2,))

    assert logits[1, [4, 6, 8]].tolist() == [-1.25, -0.75, 0.0]
    assert not logits[0].any()


def test_bias_can_force_and_forbid_a_token() -> None:
    logits = random_logits(2)
    forced = make_row(SamplingParams(temperature=0.0, logit_bias={123: 100.0}))
    best = int(logits[1].argmax())
    forbidden = make_row(SamplingParams(temperature=1.0, logit_bias={best: -100.0, 10**6: 5.0}), seed=4)

    tokens = sample(logits, [forced, forbidden])

    assert tokens[0] == 123
    assert tokens[1] != best


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_tokens_wait_for_min_tokens(temperature: float) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [2, 44]] = 50.0
    params = SamplingParams(temperature=temperature, min_tokens=3, stop_token_ids=(44,))

    early = sample(logits, [make_row(params, output=[7, 7])])[0]
    late = sample(logits, [make_row(params, output=[7, 7, 7])])[0]

    assert early not in (2, 44)
    assert late in (2, 44)


def test_logprobs_are_the_models_own_before_any_change() -> None:
    logits = random_logits(2)
    params = SamplingParams(temperature=0.0, logit_bias={123: 100.0}, logprobs=3)
    before = logits.clone()

    tokens, logprobs = Sampler((2,)).sample(logits, [make_row(params), make_row(SamplingParams(temperature=0.0))])

    expected = before[0].log_softmax(-1)
    assert tokens[0] == 123
    assert logprobs[1] is None
    assert logprobs[0] is not None
    assert math.isclose(logprobs[0].logprob, float(expected[123]), rel_tol=1e-5)
    assert [token for token, _ in logprobs[0].top] == expected.topk(3).indices.tolist()
    assert torch.equal(logits, before)


def test_logprobs_of_zero_give_the_chosen_token_only() -> None:
    _, logprobs = Sampler((2,)).sample(random_logits(1), [make_row(SamplingParams(temperature=0.0, logprobs=0))])

    assert logprobs[0] is not None
    assert logprobs[0].top == ()
