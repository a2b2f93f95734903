"""The guards of structured outputs: every fault by its code and its place, before anything is compiled."""

from __future__ import annotations

import time
from typing import Any

import pytest

from engines.structured import BadConstraint, check_schema
from engines.structured.regex_guard import check_pattern


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "code", "pointer"),
    [
        ("text", "invalid_value", ""),
        ([], "invalid_value", ""),
        ({"type": "strng"}, "invalid_value", "/type"),
        ({"type": ["string", 3]}, "invalid_value", "/type"),
        ({"type": []}, "invalid_value", "/type"),
        ({"properties": {"a/b": {"minimum": "a"}}}, "invalid_value", "/properties/a~1b/minimum"),
        ({"minimum": True}, "invalid_value", "/minimum"),
        ({"minimum": 5, "maximum": 3}, "invalid_value", "/minimum"),
        ({"minLength": 5, "maxLength": 3}, "invalid_value", "/minLength"),
        ({"minItems": -1}, "invalid_value", "/minItems"),
        ({"minItems": 1.5}, "invalid_value", "/minItems"),
        ({"maxItems": 10**9}, "schema_too_complex", "/maxItems"),
        ({"maxLength": 10**9}, "schema_too_complex", "/maxLength"),
        ({"multipleOf": 0}, "invalid_value", "/multipleOf"),
        ({"minimum": float("inf")}, "invalid_value", "/minimum"),
        ({"maxItems": float("inf")}, "invalid_value", "/maxItems"),
        ({"minimum": 10**400, "maximum": 3}, "invalid_value", "/minimum"),
        ({"enum": ["\ud800"]}, "invalid_value", ""),
        ({"anyOf": [{"$ref": "#/anyOf/²"}]}, "invalid_value", "/anyOf/0/$ref"),
        ({"enum": []}, "invalid_value", "/enum"),
        ({"enum": "a"}, "invalid_value", "/enum"),
        ({"anyOf": []}, "invalid_value", "/anyOf"),
        ({"anyOf": {}}, "invalid_value", "/anyOf"),
        ({"properties": []}, "invalid_value", "/properties"),
        ({"properties": {"a": 3}}, "invalid_value", "/properties/a"),
        ({"items": "string"}, "invalid_value", "/items"),
        ({"required": "a"}, "invalid_value", "/required"),
        ({"required": ["a", 3]}, "invalid_value", "/required/1"),
        ({"properties": {"a": False}, "required": ["a"]}, "invalid_value", "/properties/a"),
        ({"pattern": 3}, "invalid_value", "/pattern"),
        ({"pattern": "(?=a)b"}, "unsupported", "/pattern"),
        ({"pattern": "a{0,100000}"}, "schema_too_complex", "/pattern"),
        ({"patternProperties": {"(a)\\1": True}}, "unsupported", "/patternProperties/(a)\\1"),
        ({"if": {}, "then": {}}, "unsupported", "/if"),
        ({"items": {"uniqueItems": True}}, "unsupported", "/items/uniqueItems"),
        ({"dependentSchemas": {}}, "unsupported", "/dependentSchemas"),
        ({"x-guidance": {"lenient": True}}, "unsupported", "/x-guidance"),
        ({"$ref": "http://example.com/schema"}, "invalid_value", "/$ref"),
        ({"$ref": "file:///etc/passwd"}, "invalid_value", "/$ref"),
        ({"$ref": "#/$defs/none"}, "invalid_value", "/$ref"),
        ({"$ref": 3}, "invalid_value", "/$ref"),
        ({"$ref": "#"}, "invalid_value", "/$ref"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "invalid_value", "/anyOf/0/$ref"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "invalid_value", "/$defs/a/$ref/$ref"),
        (_nested(200), "schema_too_complex", "/properties/a" * 33),
        ({"properties": {f"p{i}": {} for i in range(10_000)}}, "schema_too_complex", ""),
        ({"description": "x" * (1 << 20)}, "schema_too_complex", ""),
    ],
)
def test_a_bad_schema_is_refused_with_its_pointer(schema: Any, code: str, pointer: str) -> None:
    with pytest.raises(BadConstraint) as caught:
        check_schema(schema)
    assert (caught.value.code, caught.value.pointer) == (code, pointer)
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"type": ["string", "null"], "default": None, "title": "t", "$schema": "https://json-schema.org/draft"},
        _nested(30),
        {"$defs": {"tree": {"type": "object", "properties": {"a": {"$ref": "#/$defs/tree"}}}}, "$ref": "#/$defs/tree"},
        {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
        {"properties": {"if": {"type": "string"}, "not": {"type": "string"}}},
        {"type": "array", "prefixItems": [], "items": {"minimum": 3, "maximum": 3}},
    ],
)  # fmt: skip
def test_a_schema_that_can_be_served_passes(schema: Any) -> None:
    check_schema(schema)


def test_tool_parameters_must_be_an_object_and_may_use_keywords_that_no_grammar_has() -> None:
    with pytest.raises(BadConstraint, match="must be object"):
        check_schema({"type": "string"}, needs_object=True)
    with pytest.raises(BadConstraint, match="must be an object"):
        check_schema(True, needs_object=True)
    check_schema({"type": "object", "not": {}}, needs_object=True, will_compile=False)


def test_a_fan_of_references_is_walked_once_per_place() -> None:
    defs: dict[str, Any] = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(25)}
    defs["a25"] = {"type": "string"}
    started_s = time.monotonic()
    check_schema({"$defs": defs, "$ref": "#/$defs/a0"})
    assert time.monotonic() - started_s < 5  # 2^25 paths would take minutes


@pytest.mark.parametrize(
    ("pattern", "code", "words"),
    [
        ("a(?!b)", "unsupported", "look-around at character 1"),
        ("(?<=a)b", "unsupported", "look-around at character 0"),
        ("(a)\\1", "unsupported", "back-reference at character 3"),
        ("(?P<x>a)\\k<x>", "unsupported", "back-reference at character 8"),
        ("\\bword", "unsupported", "word boundary at character 0"),
        ("a{20000}", "schema_too_complex", "20000 times"),
        ("a{1,}b{0,99999999999999}", "schema_too_complex", "times at character 6"),
        ("a" * 20_000, "schema_too_complex", "20000 characters"),
    ],
)
def test_a_pattern_that_cannot_be_served_is_refused_with_the_position(pattern: str, code: str, words: str) -> None:
    with pytest.raises(BadConstraint, match=words) as caught:
        check_pattern(pattern)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "pattern", ["[(?=]", "\\(?=x", "[\\]{99999}(?!]", "[]a](b)", "[^]]{3}", "a{0,10000}", "{x}", ""]
)
def test_what_only_looks_like_a_bad_pattern_passes(pattern: str) -> None:
    check_pattern(pattern)
