"""response_format, structured_outputs and tools: each bad value by code and param, and what good ones become."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from configs.schema import ModelSettings
from engines.structured import Constraint
from tests.gateway_harness import TINY_CHAT
from webapp.errors import ApiError
from webapp.openai.call import Call
from webapp.openai.chat_body import parse_chat
from webapp.openai.completion_body import parse_completion
from webapp.openai.served_model import ServedModel, load_served_model

USER = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def model() -> Iterator[ServedModel]:
    model = load_served_model(ModelSettings(path=str(TINY_CHAT)), version="test")
    yield model
    model.constraints.close()


def _tool(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **fields}}


def _format(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def _parse(model: ServedModel, fields: dict[str, Any]) -> Call:
    return parse_chat({"messages": [USER], **fields}, model, unknown_fields="reject")


def _constraint(model: ServedModel, fields: dict[str, Any]) -> Constraint | None:
    return _parse(model, fields).params[0].constraint


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"response_format": "json"}, "invalid_type", "response_format"),
        ({"response_format": {}}, "missing_field", "response_format.type"),
        ({"response_format": {"type": "yaml"}}, "invalid_value", "response_format.type"),
        ({"response_format": {"type": "structural_tag"}}, "unsupported", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "missing_field", "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "missing_field",
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "missing_field",
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "invalid_value",
            "response_format.json_schema.name",
        ),
        (_format({"type": "strng"}), "invalid_value", "response_format.json_schema.schema"),
        (_format({"items": {"enum": []}}), "invalid_value", "response_format.json_schema.schema"),
        (_format({"uniqueItems": True}), "unsupported", "response_format.json_schema.schema"),
        (_format({"$ref": "#"}), "invalid_value", "response_format.json_schema.schema"),
        (_format({"maxItems": 10**9}), "schema_too_complex", "response_format.json_schema.schema"),
        ({"structured_outputs": "x"}, "invalid_type", "structured_outputs"),
        ({"structured_outputs": {}}, "invalid_value", "structured_outputs"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "conflict_fields", "structured_outputs"),
        ({"structured_outputs": {"structural_tag": {}}}, "unsupported", "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": "{"}}, "invalid_value", "structured_outputs.json"),
        ({"structured_outputs": {"choice": []}}, "invalid_value", "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", "b", "a"]}}, "invalid_value", "structured_outputs.choice[2]"),
        ({"structured_outputs": {"choice": ["a", 3]}}, "invalid_type", "structured_outputs.choice[1]"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "unsupported", "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "(a)\\1"}}, "unsupported", "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "(a"}}, "invalid_value", "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a{0,100000}"}}, "schema_too_complex", "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": 'root: "a"'}}, "invalid_value", "structured_outputs.grammar"),
        ({"structured_outputs": {"grammar": "x" * (1 << 20)}}, "schema_too_complex", "structured_outputs.grammar"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "conflict_fields",
            "structured_outputs",
        ),
        ({"tools": []}, "invalid_value", "tools"),
        ({"tools": {}}, "invalid_type", "tools"),
        ({"tools": [_tool(f"f{i}") for i in range(129)]}, "out_of_range", "tools"),
        ({"tools": [_tool(), 3]}, "invalid_type", "tools[1]"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "unsupported", "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "missing_field", "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "missing_field", "tools[0].function.name"),
        ({"tools": [_tool("a b")]}, "invalid_value", "tools[0].function.name"),
        ({"tools": [_tool("a" * 65)]}, "out_of_range", "tools[0].function.name"),
        ({"tools": [_tool(), _tool()]}, "invalid_value", "tools[1].function.name"),
        ({"tools": [_tool(parameters="x")]}, "invalid_value", "tools[0].function.parameters"),
        ({"tools": [_tool(parameters={"type": "string"})]}, "invalid_value", "tools[0].function.parameters"),
        ({"tools": [_tool(parameters={"type": "strng"})]}, "invalid_value", "tools[0].function.parameters"),
        ({"tools": [_tool(parameters={"$ref": "http://x/y"})]}, "invalid_value", "tools[0].function.parameters"),
        ({"tool_choice": "required"}, "conflict_fields", "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "conflict_fields", "tool_choice"),
        ({"tools": [_tool()], "tool_choice": "always"}, "invalid_value", "tool_choice"),
        ({"tools": [_tool()], "tool_choice": {"type": "allowed_tools"}}, "unsupported", "tool_choice.type"),
        (
            {"tools": [_tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "invalid_value",
            "tool_choice.function.name",
        ),
        (
            {"tools": [_tool(parameters={"type": "object", "not": {}})], "tool_choice": "required"},
            "unsupported",
            "tools[0].function.parameters",
        ),
        ({"tools": [_tool()], "structured_outputs": {"regex": "a"}}, "conflict_fields", "structured_outputs.regex"),
        ({"parallel_tool_calls": 1}, "invalid_type", "parallel_tool_calls"),
        ({"functions": [{}]}, "unsupported", "functions"),
        ({"function_call": "auto"}, "unsupported", "function_call"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name(
    model: ServedModel, fields: dict[str, Any], code: str, param: str | None
) -> None:
    with pytest.raises(ApiError) as caught:
        _parse(model, fields)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)
    assert len(caught.value.message) < 1000


def test_the_place_inside_of_a_schema_is_told(model: ServedModel) -> None:
    with pytest.raises(ApiError, match="at #/properties/a/items/type: type must be one of"):
        _parse(model, _format({"properties": {"a": {"items": {"type": 3}}}}))


def test_legacy_fields_point_to_the_new_ones(model: ServedModel) -> None:
    with pytest.raises(ApiError, match="use `tools`"):
        _parse(model, {"functions": [{}]})
    with pytest.raises(ApiError, match="use `tool_choice`"):
        _parse(model, {"function_call": "auto"})


def test_good_fields_become_constraints_on_both_endpoints(model: ServedModel) -> None:
    assert _constraint(model, {"response_format": {"type": "text"}}) is None
    assert _constraint(model, {"response_format": {"type": "json_object"}}) == Constraint("json", '{"type":"object"}')
    assert _constraint(model, {"structured_outputs": {"regex": "[a-c]+"}}) == Constraint("regex", "[a-c]+")
    assert _constraint(model, {"structured_outputs": {"choice": ["a", 'b"']}}) == Constraint(
        "lark", r'start: "a" | "b\""'
    )
    by_text = _constraint(model, {"structured_outputs": {"json": json.dumps(SCHEMA)}})
    assert by_text == _constraint(model, _format(SCHEMA))
    assert _constraint(model, {"structured_outputs": {"json": True}}) == Constraint("json", "{}")
    call = parse_completion({"prompt": "Hi", **_format(SCHEMA)}, model, unknown_fields="reject")
    assert call.params[0].constraint == by_text


def test_tool_choice_decides_between_free_text_and_a_grammar(model: ServedModel) -> None:
    tools = {"tools": [_tool("f"), _tool("g")]}
    free, none = _parse(model, tools), _parse(model, {**tools, "tool_choice": "none"})
    assert (free.notes.tools, free.params[0].constraint) == ("auto", None)
    assert (none.notes.tools, none.params[0].constraint) == ("", None)
    assert none.prompts == _parse(model, {}).prompts  # not shown, so not called
    assert len(free.prompts[0].token_ids) > len(none.prompts[0].token_ids)

    required = _parse(model, {**tools, "tool_choice": "required", "parallel_tool_calls": False})
    named = _parse(model, {**tools, "tool_choice": {"type": "function", "function": {"name": "g"}}})
    assert (required.notes.tools, required.notes.only_first_call) == ("required", True)
    assert named.notes.tools == "named"
    assert required.params[0].constraint is not None
    assert named.params[0].constraint is not None
    assert '\\"f\\"' in required.params[0].constraint.text
    assert '\\"f\\"' not in named.params[0].constraint.text


def test_strict_is_not_shown_to_the_model(model: ServedModel) -> None:
    assert _parse(model, {"tools": [_tool(strict=True)]}).prompts == _parse(model, {"tools": [_tool()]}).prompts
