"""The constraint of a request, as it travels inside `SamplingParams`: through the record, the engines, a hand-off."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

# White space between the parts of JSON: none, one space, or a line break with its indentation. Without a bound, a small
# model that is not allowed the token it wants writes spaces until its limit.
JSON_WHITESPACE: Final = r" |\r?\n[ \t]{0,64}"


class Constraint(msgspec.Struct, frozen=True, array_like=True):
    """What the output of a choice must match from its first to its last token.

    Attributes:
        kind: `json` (a JSON Schema), `regex` (Rust syntax, the whole text) or `lark` (llguidance's dialect of Lark).
        text: the schema as JSON, the pattern, or the grammar.
    """

    kind: Literal["json", "regex", "lark"]
    text: str


def choice_grammar(choices: Sequence[str]) -> str:
    """Lark grammar of exactly these texts."""
    return "start: " + " | ".join(lark_literal(choice) for choice in choices)


def lark_schema(text: str) -> str:
    """The text that `check_schema` gave, as an expression of a Lark grammar."""
    return "%json " + json.dumps(json.loads(text) | {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE}})


def lark_literal(text: str) -> str:
    """`text` as a terminal of a Lark grammar. JSON's escapes are Lark's, too."""
    return json.dumps(text)
