"""Speculation changes nothing but the number of steps: tokens, logprobs and blocks are those of plain decoding."""

from __future__ import annotations

import random
from collections.abc import Sequence as PySequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.params import SamplingParams
from engines.sampling.peaks import find_peaks
from engines.sequence import Sequence
from engines.speculation.proposer import NgramProposer
from engines.structured import Constraint
from engines.structured.grammar import Vocabulary, build_tokenizer, compile_constraint
from engines.structured.state import GrammarState
from kvstore.state.entries import TokenLogprobs
from tests.unit.engines.engine_loop import Loop, make_sequence, random_prompts

TINY_CHAT = Path(__file__).resolve().parents[3] / "models" / "tiny-chat"
VOCAB, EOS = 2560, (2, 0)
NUM_TOKENS = 40
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS),
    "seeded": SamplingParams(temperature=0.8, top_p=0.95, top_k=40, max_tokens=NUM_TOKENS),
    "penalties": SamplingParams(
        temperature=0.7, frequency_penalty=0.4, presence_penalty=0.2, repetition_penalty=1.2, max_tokens=NUM_TOKENS
    ),
    "limits": SamplingParams(
        temperature=0.9, min_tokens=20, logit_bias={7: 4.0}, bad_word_ids=((7, 7), (9,)), max_tokens=NUM_TOKENS
    ),
    "logprobs": SamplingParams(temperature=0.6, logprobs=3, max_tokens=NUM_TOKENS),
}


class Corrupting:
    """Knows what plain decoding gives, and guesses it, wrong from a random place on."""

    def __init__(
        self,
        outputs: dict[tuple[str, int], list[int]],
        *,
        seed: int = 0,
        wrong_ids: PySequence[int] = range(3, 250),
    ) -> None:
        self._outputs = outputs
        self._wrong_ids = wrong_ids
        self._rng = random.Random(seed)
        self.num_drafted = self.num_kept = 0

    def propose(self, sequence: Sequence, *, limit: int) -> list[int]:
        at = len(sequence.output_token_ids)
        draft = self._outputs[sequence.seq_id][at : at + min(limit, self._rng.randrange(7))][:-1]
        if draft and self._rng.random() < 0.6:
            draft[self._rng.randrange(len(draft))] = self._rng.choice(self._wrong_ids)
        return draft[: sequence.grammar.num_allowed(sequence.output_token_ids, draft)] if sequence.grammar else draft

    def observe(self, sequence: Sequence, *, num_drafted: int, num_kept: int) -> None:
        assert num_kept <= num_drafted, sequence.seq_id
        self.num_drafted += num_drafted
        self.num_kept += num_kept


def make_ngram() -> NgramProposer:
    return NgramProposer(max_draft_tokens=6, min_ngram=2, max_ngram=4, end_token_ids=frozenset(EOS), max_model_len=512)


def run(loop: Loop, sequences: list[Sequence], **limits: Any) -> tuple[list[list[TokenLogprobs]], int]:
    """Logprobs of each sequence, where it has some, and the number of steps. Blocks are all back afterwards."""
    scheduler = loop.decode_scheduler(**limits)
    for sequence in sequences:
        scheduler.add(sequence)
    logprobs: dict[tuple[str, int], list[TokenLogprobs]] = {sequence.seq_id: [] for sequence in sequences}
    num_steps = 0
    while scheduler.num_running or scheduler.num_waiting:
        num_steps += 1
        assert num_steps < 2000, "the loop does not end"
        for item in loop.step(scheduler):
            sequence = item.sequence
            logprobs[sequence.seq_id] += item.logprobs or []
            if len(sequence.output_token_ids) >= sequence.params.max_tokens or sequence.output_token_ids[-1] in EOS:
                scheduler.remove(sequence.seq_id)
                loop.pool.free(sequence.block_table)
                sequence.block_table = []
    assert loop.pool.num_free == loop.pool.num_blocks
    return [logprobs[sequence.seq_id] for sequence in sequences], num_steps


def prompts() -> list[list[int]]:
    return [ids * 2 for ids in random_prompts(6, seed=11, longest=30)]


def sequences_of(params: SamplingParams) -> list[Sequence]:
    return [make_sequence(f"r{i}", ids, params, seed=i) for i, ids in enumerate(prompts())]


@pytest.fixture(scope="module")
def loop() -> Loop:
    torch.set_num_threads(1)
    return Loop.load(TINY_CHAT, num_blocks=256, block_size=8)


@pytest.mark.parametrize("name", PARAMS)
def test_right_and_wrong_guesses_give_the_tokens_and_logprobs_of_plain_decoding(loop: Loop, name: str) -> None:
    plain = sequences_of(PARAMS[name])
    plain_logprobs, num_plain_steps = run(loop, plain)
    guesser = Corrupting({sequence.seq_id: sequence.output_token_ids for sequence in plain})
    guessed = sequences_of(PARAMS[name])
    logprobs, num_steps = run(loop, guessed, proposer=guesser, max_draft_seqs=64)

    assert [s.output_token_ids for s in guessed] == [s.output_token_ids for s in plain]
    assert 0 < guesser.num_kept < guesser.num_drafted
    assert num_steps < num_plain_steps
    for ours, theirs in zip(logprobs, plain_logprobs, strict=True):
        assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in theirs], abs=1e-4)
        assert [[t for t, _ in entry.top] for entry in ours] == [[t for t, _ in entry.top] for entry in theirs]


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_n_gram_guesses_save_steps_and_change_no_token(loop: Loop, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=NUM_TOKENS)
    plain, guessed = sequences_of(params), sequences_of(params)
    _, num_plain_steps = run(loop, plain)
    _, num_steps = run(loop, guessed, proposer=make_ngram(), max_draft_seqs=64)

    assert [s.output_token_ids for s in guessed] == [s.output_token_ids for s in plain]
    assert num_steps <= num_plain_steps
    assert any(s.draft_history is not None for s in guessed)


def test_chunks_of_prompts_and_guesses_share_steps(loop: Loop) -> None:
    params = SamplingParams(temperature=0.4, max_tokens=NUM_TOKENS)
    plain, guessed = sequences_of(params), sequences_of(params)
    run(loop, plain, max_num_batched_tokens=16, max_num_seqs=3)
    guesser = Corrupting({sequence.seq_id: sequence.output_token_ids for sequence in plain}, seed=5)
    run(loop, guessed, proposer=guesser, max_num_batched_tokens=16, max_num_seqs=3)

    assert [s.output_token_ids for s in guessed] == [s.output_token_ids for s in plain]
    assert guesser.num_kept > 0


def test_a_grammar_holds_behind_guesses_and_forbidden_ones_are_cut(loop: Loop) -> None:
    constraint = Constraint("regex", "(n: [a-z0-9]{2,9}, ){8}")
    tokenizer = build_tokenizer(Vocabulary(TINY_CHAT / "tokenizer.json", VOCAB, EOS))
    params = SamplingParams(temperature=1.0, max_tokens=90, constraint=constraint)
    pairs = []
    for guessing in (False, True):
        sequences = sequences_of(params)[:3]
        for sequence in sequences:
            sequence.grammar = GrammarState(compile_constraint(constraint, tokenizer))
        if guessing:
            letters = [token for letter in "abcdefghij:" for token in tokenizer.tokenize_str(letter)]
            outputs = {sequence.seq_id: sequence.output_token_ids for sequence in pairs[0]}
            guesser = Corrupting(outputs, seed=2, wrong_ids=letters)
            run(loop, sequences, proposer=guesser)
            assert 0 < guesser.num_kept < guesser.num_drafted
        else:
            run(loop, sequences)
        pairs.append(sequences)

    assert [s.output_token_ids for s in pairs[1]] == [s.output_token_ids for s in pairs[0]]
    assert all(s.grammar is not None and not s.grammar.failure for s in pairs[1])
    text = tokenizer.decode_str(pairs[1][0].output_token_ids[:-1])
    assert text.count("n: ") == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_deterministic_engines_give_the_same_tokens_in_bfloat16_too(dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    loop = Loop.load(TINY_CHAT, num_blocks=128, block_size=32, dtype=dtype, deterministic=True)
    params = SamplingParams(temperature=0.8, max_tokens=NUM_TOKENS)
    plain, guessed = sequences_of(params), sequences_of(params)
    run(loop, plain)
    guesser = Corrupting({sequence.seq_id: sequence.output_token_ids for sequence in plain})
    run(loop, guessed, proposer=guesser, max_draft_seqs=64)

    assert [s.output_token_ids for s in guessed] == [s.output_token_ids for s in plain]
    assert guesser.num_kept > 0


def test_an_output_that_is_nan_behind_a_wrong_guess_is_nobodys_concern(loop: Loop) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
    (plain,), (guessed,) = ([make_sequence("r", prompts()[0], params)] for _ in range(2))
    run(loop, [plain])
    guesser = Corrupting({plain.seq_id: plain.output_token_ids}, seed=1)
    logits_of = loop.runner._model.logits_and_peaks

    def broken_behind_guesses(hidden: torch.Tensor, **_: bool) -> tuple[torch.Tensor, list[int], list[int]]:
        logits = logits_of(hidden)[0]
        logits[1:] = float("nan")
        return logits, *find_peaks(logits, None)

    loop.runner._model.logits_and_peaks = broken_behind_guesses  # type: ignore[method-assign]
    try:
        _, num_steps = run(loop, [guessed], proposer=guesser)
    finally:
        loop.runner._model.logits_and_peaks = logits_of  # type: ignore[method-assign]

    assert guessed.output_token_ids == plain.output_token_ids
    assert (guesser.num_kept, num_steps) == (0, len(plain.output_token_ids))
