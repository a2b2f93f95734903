"""The sampler under grammars: masks after every other change, never a row with nothing to choose."""

from __future__ import annotations

from pathlib import Path

import llguidance
import pytest
import torch

from engines.finish import FinishRule
from engines.params import SamplingParams
from engines.sampling.row import SamplingRow
from engines.sampling.sampler import Sampler
from engines.structured import Constraint
from engines.structured.grammar import Vocabulary, build_tokenizer, compile_constraint
from engines.structured.state import GrammarState

TINY_CHAT = Path(__file__).parents[3] / "models" / "tiny-chat"
VOCAB, EOS = 2560, (2, 0)
DIGITS = Constraint("regex", "[0-9]{4}")


@pytest.fixture(scope="module")
def tokenizer() -> llguidance.LLTokenizer:
    return build_tokenizer(Vocabulary(TINY_CHAT / "tokenizer.json", VOCAB, EOS))


def _row(
    tokenizer: llguidance.LLTokenizer,
    output: list[int],
    constraint: Constraint | None = DIGITS,
    *,
    choice: int = 0,
    **params: object,
) -> SamplingRow:
    grammar = None if constraint is None else GrammarState(compile_constraint(constraint, tokenizer))
    given = {"temperature": 0.0, **params}
    return SamplingRow(SamplingParams(constraint=constraint, **given), 7, choice, [1], output, grammar)


def _logits(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(3)) * 4


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_constrained_rows_choose_what_is_allowed_and_others_are_untouched(
    tokenizer: llguidance.LLTokenizer, temperature: float
) -> None:
    logits = _logits(40)
    before = logits.clone()
    rows = [_row(tokenizer, [], DIGITS if i % 2 else None, choice=i, temperature=temperature) for i in range(40)]
    plain = [_row(tokenizer, [], None, choice=i, temperature=temperature) for i in range(40)]

    ids, _ = Sampler(EOS).sample(logits, rows)
    without, _ = Sampler(EOS).sample(logits, plain)

    assert torch.equal(logits, before)
    assert all(tokenizer.decode_str([token]).isdigit() for token in ids[1::2])
    assert ids[::2] == without[::2]


def test_logprobs_are_those_of_the_model_before_the_mask(tokenizer: llguidance.LLTokenizer) -> None:
    logits = _logits(1)
    (token,), (logprobs,) = Sampler(EOS).sample(logits, [_row(tokenizer, [], logprobs=2)])
    assert logprobs is not None
    assert logprobs.logprob == pytest.approx(float(logits.log_softmax(-1)[0, token]), abs=1e-5)
    assert logprobs.top[0][0] == int(logits.argmax())


def test_a_complete_output_ends_whatever_min_tokens_and_ignore_eos_say(tokenizer: llguidance.LLTokenizer) -> None:
    row = _row(tokenizer, tokenizer.tokenize_str("1234"), min_tokens=100, ignore_eos=True)
    (token,), _ = Sampler(EOS).sample(_logits(1), [row])

    assert token in EOS
    assert row.grammar is not None
    assert not row.grammar.failure
    finish = FinishRule(frozenset(EOS), 4096).check(row.params, 1, [*row.output_ids, token])
    assert finish is not None
    assert finish.reason == "stop"


def test_an_output_that_other_fields_leave_nothing_of_fails_by_name(tokenizer: llguidance.LLTokenizer) -> None:
    letters = tuple(tokenizer.tokenize_str("x"))
    rows = [_row(tokenizer, [], allowed_token_ids=letters), _row(tokenizer, [])]
    ids, _ = Sampler(EOS).sample(_logits(2), rows)

    assert rows[0].grammar is not None
    assert "other fields" in rows[0].grammar.failure
    assert rows[1].grammar is not None
    assert not rows[1].grammar.failure
    assert tokenizer.decode_str([ids[1]]).isdigit()


def test_a_whole_output_matches_at_any_temperature(tokenizer: llguidance.LLTokenizer) -> None:
    for temperature in (0.0, 1.0, 2.0):
        output: list[int] = []
        row = _row(tokenizer, output, Constraint("regex", "[a-c]{2,5}-[0-9]+;"), temperature=temperature)
        for step in range(200):
            generator = torch.Generator().manual_seed(step)
            (token,), _ = Sampler(EOS).sample(torch.randn(1, VOCAB, generator=generator), [row])
            if token in EOS:
                break
            output.append(token)
        text = tokenizer.decode_str(output)
        head, _, tail = text.partition("-")
        assert set(head) <= set("abc") and 2 <= len(head) <= 5
        assert tail[:-1].isdigit() and tail.endswith(";")
