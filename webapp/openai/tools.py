"""Fields about tools: which functions a model may call, and whether it has to.

tool_choice   prompt lists the tools   output                              finish_reason of a call
none          no                       plain text
auto          yes                      free; calls are read out of it      tool_calls
required      yes                      a grammar: one call or several      tool_calls
named         yes                      a grammar: one call of this one     stop
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from engines.structured import Constraint
from engines.structured.constraint import lark_literal, lark_schema
from webapp.errors import InvalidRequest
from webapp.openai.fields import Boolean, Text, out_of_range, shown, wrong_type
from webapp.openai.structured import Structured, schema_text
from webapp.openai.surface import Checked
from webapp.openai.tool_calls import CLOSE, OPEN

MAX_TOOLS: Final = 128
WORDS: Final = ("none", "auto", "required")
NAMED: Final = "named"
_SHOWN: Final = ("name", "description", "parameters")
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Tool:
    """A function. `shown` is what the chat template gets: name, description and parameters, in the client's order."""

    name: str
    parameters: dict[str, Any]
    path: str
    shown: dict[str, Any]


@dataclass(frozen=True)
class ToolChoice:
    """`mode` is none, auto, required or named."""

    mode: str
    name: str = ""


@dataclass(frozen=True)
class ToolUse:
    """What the fields mean together. `mode` is "" where the text is left alone."""

    mode: str = ""
    tools: tuple[Tool, ...] = ()
    only_first_call: bool = False

    @property
    def shown(self) -> list[dict[str, Any]] | None:
        """For the chat template."""
        return [tool.shown for tool in self.tools] or None


def check_tools(value: Any, path: str) -> list[Tool]:
    """Raises:
    InvalidRequest: with the index of the first bad tool.
    """
    if not isinstance(value, list):
        raise wrong_type(path, "an array", value)
    if not value:
        raise InvalidRequest("invalid_value", f"{path} must hold at least one tool; leave it out for none", param=path)
    if len(value) > MAX_TOOLS:
        raise out_of_range(path, f"an array of at most {MAX_TOOLS} tools", f"{len(value)} tools")
    tools = [_tool(item, f"{path}[{i}]") for i, item in enumerate(value)]
    seen: set[str] = set()
    for tool in tools:
        if tool.name in seen:
            where = f"{tool.path}.function.name"
            raise InvalidRequest("invalid_value", f"{where} {tool.name} is there twice", param=where)
        seen.add(tool.name)
    return tools


def check_tool_choice(value: Any, path: str) -> ToolChoice:
    """Raises:
    InvalidRequest: not one of the four forms.
    """
    if isinstance(value, str):
        if value not in WORDS:
            message = (
                f"{path} must be one of {', '.join(WORDS)}, or an object that names a function (got {shown(value)})"
            )
            raise InvalidRequest("invalid_value", message, param=path)
        return ToolChoice(value)
    if not isinstance(value, dict):
        raise wrong_type(path, "a string or an object", value)
    if value.get("type") != "function":
        message = f"{path}.type must be function (got {shown(value.get('type'))})"
        raise InvalidRequest("unsupported", message, param=f"{path}.type")
    function = value.get("function")
    if not isinstance(function, dict):
        raise wrong_type(f"{path}.function", "an object", function)
    return ToolChoice(NAMED, Text(1, 64, allow_nul=False)(function.get("name"), f"{path}.function.name"))


def tool_use(checked: Checked) -> ToolUse:
    """The tool fields together.

    Raises:
        InvalidRequest: a call is asked for that cannot be made.
    """
    tools: list[Tool] = checked.get("tools", [])
    choice: ToolChoice = checked.get("tool_choice", ToolChoice("auto"))
    if not tools:
        if choice.mode in ("required", NAMED):
            message = f"tool_choice {choice.mode} needs tools; send tools, or leave tool_choice out"
            raise InvalidRequest("conflict_fields", message, param="tool_choice")
        return ToolUse()
    if choice.mode == NAMED and choice.name not in {tool.name for tool in tools}:
        message = f"tool_choice.function.name {shown(choice.name)} is none of the tools"
        raise InvalidRequest("invalid_value", message, param="tool_choice.function.name")
    if choice.mode == "none":
        return ToolUse()
    only_first_call = choice.mode == NAMED or not checked.get("parallel_tool_calls", True)
    return ToolUse(choice.mode, tuple(tools), only_first_call)


def with_calls(structured: Structured | None, use: ToolUse, checked: Checked) -> Structured | None:
    """The constraint of an output that must be, or may be, tool calls.

    Raises:
        InvalidRequest: calls and another constraint exclude each other.
    """
    if use.mode in ("required", NAMED):
        choice: ToolChoice = checked.get("tool_choice", ToolChoice("auto"))
        tools = [tool for tool in use.tools if choice.mode != NAMED or tool.name == choice.name]
        grammar = _calls(tools, only_one=use.only_first_call)
        path = f"{tools[0].path}.function.parameters" if len(tools) == 1 else "tools"
        return Structured(Constraint("lark", f"start: calls\n{grammar}"), path)
    if use.mode != "auto" or structured is None:
        return structured
    if structured.constraint.kind != "json":
        message = f"{structured.path} leaves no room for tool calls; send tool_choice none, or no tools"
        raise InvalidRequest("conflict_fields", message, param=structured.path)
    grammar = _calls(list(use.tools), only_one=use.only_first_call)
    text = f"start: calls | content\ncontent: {lark_schema(structured.constraint.text)}\n{grammar}"
    return Structured(Constraint("lark", text), structured.path)


def _calls(tools: list[Tool], *, only_one: bool) -> str:
    """Lark rules of `calls`, in the form that the model was shown: one JSON object between tags."""
    names = [f"call{i}" for i in range(len(tools))]
    rules = [f"calls: call{'' if only_one else '(' + lark_literal(chr(10)) + ' call)*'}", f"call: {' | '.join(names)}"]
    for name, tool in zip(names, tools, strict=True):
        opening = lark_literal(f'{OPEN}\n{{"name": "{tool.name}", "arguments": ')
        rules.append(f"{name}: {opening} {name}args {lark_literal('}' + chr(10) + CLOSE)}")
        schema = schema_text(tool.parameters, f"{tool.path}.function.parameters", needs_object=True)
        rules.append(f"{name}args: {lark_schema(schema)}")
    return "\n".join(rules)


def _tool(item: Any, path: str) -> Tool:
    if not isinstance(item, dict):
        raise wrong_type(path, "an object", item)
    if item.get("type", "function") != "function":
        message = f"{path}.type must be function (got {shown(item['type'])})"
        raise InvalidRequest("unsupported", message, param=f"{path}.type")
    function = item.get("function")
    where = f"{path}.function"
    if function is None:
        raise InvalidRequest("missing_field", f"{where} is required", param=where)
    if not isinstance(function, dict):
        raise wrong_type(where, "an object", function)
    name = _checked_name(function.get("name"), f"{where}.name")
    if function.get("description") is not None:
        Text()(function["description"], f"{where}.description")
    if function.get("strict") is not None:
        Boolean()(function["strict"], f"{where}.strict")
    parameters = function.get("parameters")
    if parameters is not None:
        # The model may call it or not, so what only a grammar would need is checked when there is one.
        schema_text(parameters, f"{where}.parameters", needs_object=True, will_compile=False)
    shown_function = {key: value for key, value in function.items() if key in _SHOWN and value is not None}
    return Tool(name, parameters or {"type": "object"}, path, {"type": "function", "function": shown_function})


def _checked_name(value: Any, path: str) -> str:
    if value is None:
        raise InvalidRequest("missing_field", f"{path} is required", param=path)
    name = Text(1, 64, allow_nul=False)(value, path)
    if not _NAME.fullmatch(name):
        message = f"{path} must be letters, digits, _ and - only (got {shown(name)})"
        raise InvalidRequest("invalid_value", message, param=path)
    return name


def text_of(tools: list[dict[str, Any]] | None) -> str:
    """The tools as JSON, to measure them."""
    return json.dumps(tools or [], ensure_ascii=False)
