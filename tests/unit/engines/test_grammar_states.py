"""Compiled constraints: what they let through, states as functions of ids, compiling beside the engine thread."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import pytest

from engines.params import SamplingParams
from engines.sequence import Sequence
from engines.structured import BadConstraint, Constraint, choice_grammar
from engines.structured.checker import ConstraintChecker
from engines.structured.compiler import WAIT_S, Due, GrammarCompiler
from engines.structured.constraint import lark_schema
from engines.structured.grammar import Vocabulary, build_tokenizer, compile_constraint
from engines.structured.state import GrammarMasks, GrammarState

TINY_CHAT = Path(__file__).parents[3] / "models" / "tiny-chat"
VOCABULARY = Vocabulary(TINY_CHAT / "tokenizer.json", 2560, (2, 0))
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


@pytest.fixture(scope="module")
def tokenizer() -> llguidance.LLTokenizer:
    return build_tokenizer(VOCABULARY)


def _json(schema: Any) -> Constraint:
    return Constraint("json", json.dumps(schema))


def _allowed(state: GrammarState) -> list[int]:
    (row,) = GrammarMasks(VOCABULARY.size, 1).forbidden([state])
    return [int(i) for i in np.flatnonzero(np.unpackbits(row, bitorder="little") == 0)]


def _matches(tokenizer: llguidance.LLTokenizer, constraint: Constraint, text: str) -> bool:
    matcher = compile_constraint(constraint, tokenizer)
    ids = tokenizer.tokenize_str(text)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (_json(PERSON), '{"name": "Anna", "age": 18}', '{"name": "Anna"}'),
        (_json(PERSON), '{\n    "name": "Anna",\n    "age": 18\n}', '{"name":  "Anna", "age": 18}'),
        (_json({"type": "object"}), "{}", "[]"),
        (_json({"enum": ["é", 3]}), '"é"', '"e"'),
        (Constraint("regex", "[0-9]{3}-[a-c]{2}"), "123-ab", "12-ab"),
        (Constraint("lark", choice_grammar(['a"b\n', "é"])), 'a"b\n', "a"),
        (Constraint("lark", 'start: "a" start "b" | "c"'), "aacbb", "aacb"),
        (Constraint("lark", 'start: start "a" | "b"'), "baa", "aab"),
        (Constraint("lark", "start: x\nx: " + lark_schema('{"type":"integer"}')), "12", "a"),
    ],
)
def test_a_constraint_lets_through_what_matches_it(
    tokenizer: llguidance.LLTokenizer, constraint: Constraint, good: str, bad: str
) -> None:
    assert _matches(tokenizer, constraint, good)
    assert not _matches(tokenizer, constraint, bad)


@pytest.mark.parametrize(
    ("constraint", "code"),
    [
        (_json({"allOf": [{"type": "string"}, {"type": "number"}]}), "invalid_value"),
        (_json({"type": "string", "format": "no-such-format"}), "unsupported"),
        (_json({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}), "unsupported"),
        (Constraint("regex", "(a"), "invalid_value"),
        (Constraint("regex", "[z-a]"), "invalid_value"),
        (Constraint("lark", 'root: "a"'), "invalid_value"),
        (Constraint("lark", "start: a\na: a"), "invalid_value"),
        (Constraint("lark", "start: @other"), "invalid_value"),
        (Constraint("lark", "x" * (1 << 20)), "schema_too_complex"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(
    tokenizer: llguidance.LLTokenizer, constraint: Constraint, code: str
) -> None:
    with pytest.raises(BadConstraint) as caught:
        compile_constraint(constraint, tokenizer)
    assert caught.value.code == code
    assert caught.value.message


def test_only_end_tokens_may_follow_a_complete_output(tokenizer: llguidance.LLTokenizer) -> None:
    state = GrammarState(compile_constraint(_json(PERSON), tokenizer))
    state.follow(tokenizer.tokenize_str('{"name": "Anna", "age": 18}'))
    assert _allowed(state) == [0, 2]


def test_a_state_is_a_function_of_the_ids_alone(tokenizer: llguidance.LLTokenizer) -> None:
    template = compile_constraint(_json(PERSON), tokenizer)
    ids = tokenizer.tokenize_str('{"name": "Anna", "age": 18}')
    growing: list[int] = []
    stepwise, other = GrammarState(template.deep_copy()), GrammarState(template.deep_copy())
    other.follow(tokenizer.tokenize_str('{"name": "Bert'))
    for token in ids:
        growing.append(token)
        stepwise.follow(growing)
        fresh = GrammarState(template.deep_copy())
        fresh.follow(list(growing))
        other.follow(list(growing))  # from another text: starts over
        assert _allowed(stepwise) == _allowed(fresh) == _allowed(other)
    stepwise.follow(ids[:3])  # an earlier owner's shorter text
    fresh = GrammarState(template.deep_copy())
    fresh.follow(ids[:3])
    assert _allowed(stepwise) == _allowed(fresh)


def test_ids_that_do_not_match_fail_the_state_and_no_other(tokenizer: llguidance.LLTokenizer) -> None:
    template = compile_constraint(_json(PERSON), tokenizer)
    broken, sound = GrammarState(template.deep_copy()), GrammarState(template.deep_copy())
    broken.follow(tokenizer.tokenize_str("not json"))
    rows = GrammarMasks(VOCABULARY.size, 2).forbidden([broken, sound, sound])

    assert "do not match" in broken.failure
    assert (rows[0] == 255).all()
    assert not sound.failure
    assert not (rows[1] == 255).all()
    assert (rows[1] == rows[2]).all()


def _sequence(constraint: Constraint | None, rid: str = "r") -> Sequence:
    return Sequence(rid, 0, [1], SamplingParams(constraint=constraint), 0)


class _Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def _wait(compiler: GrammarCompiler) -> list[Due]:
    end_s = time.monotonic() + 20
    while not (due := compiler.due()):
        assert time.monotonic() < end_s
    return due


def test_a_sequence_waits_for_its_grammar_and_the_next_one_finds_it() -> None:
    compiler = GrammarCompiler(VOCABULARY, _Clock())
    first, second, plain = _sequence(_json(PERSON)), _sequence(_json(PERSON), "s"), _sequence(None)
    assert compiler.is_ready(plain)
    if not compiler.is_ready(first):
        compiler.park(first)
        (due,) = _wait(compiler)
        assert (due.sequence, due.failure) == (first, "")
    assert compiler.is_ready(second)
    assert first.grammar is not None
    assert first.grammar is not second.grammar
    assert compiler.next_wakeup_s() is None


def test_a_bad_constraint_fails_its_own_sequence_by_name() -> None:
    compiler = GrammarCompiler(VOCABULARY, _Clock())
    bad = _sequence(Constraint("regex", "(a"))
    assert not compiler.is_ready(bad)
    compiler.park(bad)
    (due,) = _wait(compiler)
    assert due.code == "invalid_value"
    assert "unclosed group" in due.failure
    assert compiler.due() == []


def test_a_sequence_does_not_wait_for_ever_nor_after_it_ended() -> None:
    clock = _Clock()
    compiler = GrammarCompiler(Vocabulary(TINY_CHAT / "tokenizer.json", 2560, (2, 0)), clock)
    slow, gone = _sequence(_json(PERSON)), _sequence(_json({"type": "array"}), "gone")
    for sequence in (slow, gone):
        compiler.ask(sequence.params.constraint)
        compiler.park(sequence)
    compiler.forget(gone.seq_id)
    clock.now_s = WAIT_S + 1
    dues = compiler.due()
    assert [due.sequence.rid for due in dues] == ["r"]
    assert dues[0].code in ("schema_too_complex", "")  # "": it was compiled meanwhile, late but good


@pytest.fixture(scope="module")
def checker() -> Iterator[ConstraintChecker]:
    checker = ConstraintChecker(VOCABULARY.tokenizer_json, VOCABULARY.size, VOCABULARY.eos_token_ids)
    yield checker
    checker.close()


def test_the_checker_passes_good_constraints_and_names_the_fault_of_bad_ones(checker: ConstraintChecker) -> None:
    checker.check(_json(PERSON))
    for _ in range(2):  # asked, then remembered
        with pytest.raises(BadConstraint) as caught:
            checker.check(_json({"properties": {"a": {"$ref": "#/properties/a"}}}))
        assert (caught.value.code, caught.value.pointer) == ("invalid_value", "/properties/a/$ref")


def test_what_takes_too_long_is_refused_and_the_next_check_is_served(checker: ConstraintChecker) -> None:
    heavy = json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(15_000)}}, separators=(",", ":"))
    with pytest.raises(BadConstraint, match="more than 2 s") as caught:
        checker.check(Constraint("lark", f"start: x\nx: %json {heavy}"))
    assert caught.value.code == "schema_too_complex"
    checker.check(_json({"type": "array", "items": {"type": "integer"}}))


def test_a_tokenizer_without_an_end_token_cannot_be_constrained() -> None:
    with pytest.raises(BadConstraint, match="no end token") as caught:
        build_tokenizer(Vocabulary(TINY_CHAT / "tokenizer.json", 2560, ()))
    assert caught.value.code == "unsupported"
