"""`messages` of a chat body: roles, contents and tool calls, as the template takes them."""

from __future__ import annotations

from typing import Any, Final

from webapp.errors import InvalidRequest
from webapp.openai.fields import Text, out_of_range, shown, wrong_type

MAX_MESSAGES: Final = 2048
ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_KNOWN: Final = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "reasoning_content", "refusal"}
_TEXT: Final = Text()


def check_messages(value: Any, path: str = "messages") -> list[dict[str, Any]]:
    """Messages in the form that chat templates read: contents joined to one string, developer as system.

    Raises:
        InvalidRequest: with the path of the first bad part.
    """
    if not isinstance(value, list):
        raise wrong_type(path, "an array", value)
    if not value:
        raise InvalidRequest("invalid_value", f"{path} must hold at least one message", param=path)
    if len(value) > MAX_MESSAGES:
        raise out_of_range(path, f"at most {MAX_MESSAGES} messages", len(value))
    call_ids: set[str] = set()
    return [_message(item, f"{path}[{i}]", call_ids) for i, item in enumerate(value)]


def _message(item: Any, path: str, call_ids: set[str]) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise wrong_type(path, "an object", item)
    role = item.get("role")
    if role is None:
        raise InvalidRequest("missing_field", f"{path}.role is required", param=f"{path}.role")
    if role not in ROLES:
        hint = "; use role tool" if role == "function" else ""
        message = f"{path}.role must be one of {', '.join(ROLES)} (got {shown(role)}){hint}"
        raise InvalidRequest("invalid_value", message, param=f"{path}.role")
    for name in item:
        if name not in _KNOWN:
            where = f"{path}.{name[:100]}"
            raise InvalidRequest("unsupported", f"{where} is not supported; leave it out", param=where)
    out: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = item.get("tool_calls")
    if calls is not None:
        out["tool_calls"] = _tool_calls(calls, role, f"{path}.tool_calls", call_ids)
    out["content"] = _content(item.get("content"), f"{path}.content", may_lack=role == "assistant" and bool(calls))
    if item.get("name") is not None:
        out["name"] = Text(1, 64, allow_nul=False)(item["name"], f"{path}.name")
    reasoning = item.get("reasoning_content") or item.get("reasoning")
    if reasoning is not None:
        out["reasoning_content"] = _TEXT(reasoning, f"{path}.reasoning_content")
    if role == "tool":
        out["tool_call_id"] = _call_id(item.get("tool_call_id"), f"{path}.tool_call_id", call_ids)
    return out


def _content(value: Any, path: str, *, may_lack: bool) -> str:
    if value is None:
        if may_lack:
            return ""
        raise InvalidRequest("missing_field", f"{path} is required", param=path)
    if isinstance(value, str):
        return _TEXT(value, path)
    if not isinstance(value, list):
        raise wrong_type(path, "a string or an array of text parts", value)
    return "".join(_part(part, f"{path}[{i}]") for i, part in enumerate(value))


def _part(part: Any, path: str) -> str:
    if not isinstance(part, dict):
        raise wrong_type(path, "an object", part)
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        message = f"{path}.type: this model takes text only (got {shown(kind)}); nothing was fetched"
        raise InvalidRequest("unsupported", message, param=f"{path}.type")
    if part.get(kind) is None:
        raise InvalidRequest("missing_field", f"{path}.{kind} is required", param=f"{path}.{kind}")
    return _TEXT(part[kind], f"{path}.{kind}")


def _tool_calls(calls: Any, role: str, path: str, call_ids: set[str]) -> list[dict[str, Any]]:
    if role != "assistant":
        raise InvalidRequest("invalid_value", f"{path} is for role assistant only", param=path)
    if not isinstance(calls, list):
        raise wrong_type(path, "an array", calls)
    out: list[dict[str, Any]] = []
    for i, call in enumerate(calls):
        where = f"{path}[{i}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise wrong_type(f"{where}.function", "an object", function)
        name = Text(1, 64, allow_nul=False)(function.get("name"), f"{where}.function.name")
        arguments = Text()(function.get("arguments", "{}"), f"{where}.function.arguments")
        call_id = Text(1, 128, allow_nul=False)(call.get("id"), f"{where}.id")
        call_ids.add(call_id)
        out.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
    return out


def _call_id(value: Any, path: str, call_ids: set[str]) -> str:
    if value is None:
        raise InvalidRequest("missing_field", f"{path} is required for role tool", param=path)
    call_id = Text(1, 128, allow_nul=False)(value, path)
    if call_id not in call_ids:
        message = f"{path} names no tool call of an assistant message before it (got {shown(call_id)})"
        raise InvalidRequest("invalid_value", message, param=path)
    return call_id
