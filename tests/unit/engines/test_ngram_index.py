"""Prompt look-up: what is guessed, how much of it, and what of it is kept."""

from __future__ import annotations

import random

import pytest

from engines.params import SamplingParams
from engines.sequence import Sequence
from engines.speculation.acceptance import PROBE_EVERY, Acceptance
from engines.speculation.ngram_index import MAX_CANDIDATES, NgramIndex
from engines.speculation.proposer import NgramProposer
from engines.speculation.verify import num_kept_tokens


def index_of(ids: list[int], *, min_size: int = 2, max_size: int = 4) -> NgramIndex:
    index = NgramIndex(min_size=min_size, max_size=max_size)
    index.follow(ids, [])
    return index


def slow_guess(ids: list[int], num_tokens: int, *, min_size: int, max_size: int) -> list[int]:
    """The definition, with a scan over the whole sequence."""
    best, best_size, num_candidates = -1, 0, 0
    for place in range(len(ids) - 1, min_size - 1, -1):
        size = 0
        while size < max_size and size < place and ids[place - 1 - size] == ids[-1 - size]:
            size += 1
        if size < min_size or num_candidates >= MAX_CANDIDATES:
            continue
        num_candidates += 1
        if size > best_size:
            best, best_size = place, size
    guess = ids[best:] if best >= 0 else []
    while guess and len(guess) < num_tokens:
        guess += guess[: len(ids) - best]
    return guess[:num_tokens]


def test_what_followed_the_longest_match_is_guessed_and_the_latest_of_equal_ones() -> None:
    assert index_of([1, 2, 3, 8, 9, 2, 3, 7, 1, 2, 3]).propose(2) == [8, 9]
    assert index_of([2, 3, 8, 5, 2, 3, 7, 5, 6, 2, 3]).propose(2) == [7, 5]


def test_no_guess_without_a_match_of_the_smallest_size() -> None:
    assert index_of([1, 2, 3, 4, 9, 4]).propose(5) == []
    assert index_of([1], min_size=2).propose(5) == []
    assert index_of([]).propose(5) == []


def test_a_match_at_the_end_goes_on_with_itself() -> None:
    assert index_of([9, 5, 6, 5, 6, 5, 6]).propose(5) == [5, 6, 5, 6, 5]
    assert index_of([4, 4, 4, 4]).propose(3) == [4, 4, 4]


@pytest.mark.parametrize("seed", range(20))
def test_token_by_token_the_index_finds_what_a_scan_finds(seed: int) -> None:
    rng = random.Random(seed)
    min_size, max_size = rng.choice([(1, 1), (1, 3), (2, 2), (2, 5), (3, 4)])
    prompt = [rng.randrange(3) for _ in range(rng.randrange(30))]
    index = NgramIndex(min_size=min_size, max_size=max_size)
    output: list[int] = []
    for _ in range(60):
        output.append(rng.randrange(3))
        if rng.random() < 0.5:
            continue  # several tokens at once, as after a verified draft
        index.follow(prompt, output)
        expected = slow_guess(prompt + output, 6, min_size=min_size, max_size=max_size)
        assert index.propose(6) == expected


def test_a_sequence_whose_guesses_are_right_gets_long_ones() -> None:
    acceptance = Acceptance()
    assert 1 < acceptance.draft_length(8) < 8
    for _ in range(20):
        acceptance.observe(num_drafted=8, num_kept=8)

    assert acceptance.draft_length(8) == 8


def test_a_sequence_whose_guesses_are_wrong_gets_one_now_and_then_and_can_recover() -> None:
    acceptance = Acceptance()
    for _ in range(20):
        acceptance.observe(num_drafted=2, num_kept=0)
    lengths = [acceptance.draft_length(8) for _ in range(3 * PROBE_EVERY)]
    assert (sum(lengths), max(lengths)) == (3, 1)

    for _ in range(20):
        acceptance.observe(num_drafted=1, num_kept=1)
    assert acceptance.draft_length(8) > 1


def proposer(*, max_model_len: int = 1000) -> NgramProposer:
    return NgramProposer(
        max_draft_tokens=8, min_ngram=2, max_ngram=4, end_token_ids=frozenset({0}), max_model_len=max_model_len
    )


def sure(sequence: Sequence, proposer: NgramProposer) -> Sequence:
    """A sequence all of whose guesses were right so far."""
    proposer.propose(sequence, limit=8)
    assert sequence.draft_history is not None
    for _ in range(30):
        sequence.draft_history.acceptance.observe(num_drafted=8, num_kept=8)
    return sequence


def test_no_guess_can_be_past_the_end_of_an_output() -> None:
    ids = [5, 6, 7, 5, 6, 7, 5, 6]
    params = SamplingParams(max_tokens=6)
    guesser = proposer()
    sequence = sure(Sequence("r", 0, ids, params, 0, output_token_ids=[7, 5, 6]), guesser)
    assert guesser.propose(sequence, limit=8) == [7, 5]  # and one more is sampled: 6 tokens
    short = proposer(max_model_len=len(ids) + 3 + 2)
    assert short.propose(sequence, limit=8) == [7]
    assert guesser.propose(sequence, limit=1) == [7]


def test_neither_end_tokens_nor_stop_ids_are_guessed() -> None:
    guesser = proposer()
    ended = sure(
        Sequence("r", 0, [5, 6, 7, 0, 8, 5, 6], SamplingParams(max_tokens=50), 0, output_token_ids=[]), guesser
    )
    assert guesser.propose(ended, limit=8) == [7]
    stop = SamplingParams(max_tokens=50, stop_token_ids=(7,))
    assert guesser.propose(Sequence("s", 0, ended.prompt_token_ids, stop, 0), limit=8) == []


@pytest.mark.parametrize(
    ("sampled", "num_kept"), [([1, 2, 3, 4], 4), ([1, 2, 9, 4], 3), ([1, 9, 3, 4], 2), ([9, 2, 3, 4], 1)]
)
def test_tokens_are_kept_up_to_the_first_behind_a_wrong_guess(sampled: list[int], num_kept: int) -> None:
    assert num_kept_tokens([1, 2, 3], sampled, [True] * 4) == num_kept


def test_a_token_that_could_not_be_chosen_is_not_kept() -> None:
    assert num_kept_tokens([1, 2, 3], [1, 2, 3, 4], [True, True, False, True]) == 2
