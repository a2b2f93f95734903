"""From a constraint to a compiled matcher of llguidance, with limits on what a grammar may cost at every step.

    Constraint --guards--> grammar text --LLMatcher--> matcher: mask of the next tokens, advanced by each token

Compiling releases the GIL and cannot be interrupted: callers run it where that does no harm (`checker_main`, a child
process that is killed; `compiler`, a thread beside the engine's).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import llguidance

from engines.structured.constraint import JSON_WHITESPACE, Constraint
from engines.structured.errors import BadConstraint
from engines.structured.regex_guard import check_pattern
from engines.structured.schema_guard import MAX_SCHEMA_BYTES, check_schema

# llguidance's defaults, written down because they bound what one step may take: about 15 ms for the mask of a hostile
# grammar. No verbose errors: those repeat the client's schema in our log.
LIMITS: Final = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=250_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
_UNSUPPORTED: Final = re.compile(r"not supported|[Uu]nimplemented|Unknown format|not implemented")
_TOO_COMPLEX: Final = re.compile(r"too (large|complex|many|big)|limit|fuel")


@dataclass(frozen=True)
class Vocabulary:
    """What a grammar must know of the model: `size` rows of logits, ids that end the output, tokenizer.json."""

    tokenizer_json: Path
    size: int
    eos_token_ids: tuple[int, ...]


def build_tokenizer(vocabulary: Vocabulary) -> llguidance.LLTokenizer:
    """About a second for a vocabulary of 150,000; blocks.

    Raises:
        BadConstraint: no output of this model can be constrained.
    """
    if not vocabulary.eos_token_ids:
        raise BadConstraint("unsupported", "this model names no end token, so its output cannot be constrained")
    try:
        return llguidance.LLTokenizer(
            vocabulary.tokenizer_json.read_text(), n_vocab=vocabulary.size, eos_token=list(vocabulary.eos_token_ids)
        )
    except Exception as error:  # the Rust library raises plain Exception and ValueError
        message = f"the output of this model cannot be constrained: its tokenizer has no byte-level form ({error})"
        raise BadConstraint("unsupported", message[:300]) from error


def compile_constraint(constraint: Constraint, tokenizer: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """A matcher at its beginning, for which at least one token may come.

    Raises:
        BadConstraint: refused by a guard, by the compiler, or nothing at all would match it.
    """
    matcher = llguidance.LLMatcher(tokenizer, _grammar_text(constraint), log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise _refusal(matcher.get_error())
    mask = matcher.compute_bitmask()
    if matcher.is_error():
        raise _refusal(matcher.get_error())
    if not any(mask):
        raise BadConstraint("invalid_value", "nothing matches this constraint")
    return matcher


def _grammar_text(constraint: Constraint) -> str:
    if len(constraint.text.encode("utf-8", "replace")) > MAX_SCHEMA_BYTES:
        raise BadConstraint("schema_too_complex", f"a constraint may have at most {MAX_SCHEMA_BYTES} bytes")
    if constraint.kind == "json":
        text = check_schema(json.loads(constraint.text))
        options: Any = {"whitespace_pattern": JSON_WHITESPACE}
        return str(llguidance.LLMatcher.grammar_from_json_schema(text, overrides=options))
    if constraint.kind == "regex":
        check_pattern(constraint.text)
        return str(llguidance.LLMatcher.grammar_from_regex(constraint.text))
    return str(llguidance.LLMatcher.grammar_from_lark(constraint.text))


def _refusal(words: str) -> BadConstraint:
    """The compiler's words, on one line."""
    message = " ".join(words.split())[:500]
    if message.startswith("panic"):
        return BadConstraint("schema_too_complex", "it is beyond what the grammar compiler can hold; use a simpler one")
    if _UNSUPPORTED.search(message):
        return BadConstraint("unsupported", message)
    return BadConstraint("schema_too_complex" if _TOO_COMPLEX.search(message) else "invalid_value", message)
