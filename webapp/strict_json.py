"""A request body as JSON, strictly: UTF-8, at most 64 levels, no key twice, no NaN, no huge numbers.

The order is the point: nothing recurses before the depth is known, and nothing is decoded before it is UTF-8.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, Final

from webapp.errors import InvalidRequest

MAX_DEPTH: Final = 64
# More digits than any field's range: such a number only has to be out of range. Python would refuse 4,301 digits.
_MAX_INT_DIGITS: Final = 30
_HUGE: Final = 10**_MAX_INT_DIGITS
_TOKENS: Final = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)


def decode_object(body: bytes, *, duplicate_keys: str = "reject") -> dict[str, Any]:
    """The JSON object in `body`.

    Args:
        duplicate_keys: "reject", or "last" to let the last one win.

    Raises:
        InvalidRequest: `malformed_json` or, for another top level, `invalid_type`.
    """
    if body.startswith(codecs.BOM_UTF8):
        body = body[3:]
    if not body.strip():
        raise _malformed("body is empty; expected a JSON object")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _malformed(f"body must be UTF-8 (byte {error.start} is not)") from error
    if depth_of(body) > MAX_DEPTH:
        raise _malformed(f"body is nested deeper than {MAX_DEPTH} levels")
    pairs = _unique if duplicate_keys == "reject" else dict
    try:
        value = json.loads(
            text, object_pairs_hook=pairs, parse_int=_integer, parse_float=float, parse_constant=_no_constant
        )
    except json.JSONDecodeError as error:
        raise _malformed(f"{error.msg} at line {error.lineno} column {error.colno} (byte {error.pos})") from error
    if not isinstance(value, dict):
        raise InvalidRequest("invalid_type", f"expected a JSON object, got {kind_of(value)}")
    return value


def depth_of(body: bytes) -> int:
    """Deepest nesting of arrays and objects, by a scan that skips strings; stops early when too deep."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return 0  # cannot be too deep, whatever is in strings
    depth = deepest = 0
    for match in _TOKENS.finditer(body):
        first = body[match.start()]
        if first in b"[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > MAX_DEPTH:
                break
        elif first in b"]}":
            depth -= 1
    return deepest


def kind_of(value: object) -> str:
    """The JSON word for a value's type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InvalidRequest("malformed_json", f"key {key[:200]!r} is given twice in one object", param=key[:200])
        found[key] = value
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MAX_INT_DIGITS:
        return -_HUGE if digits.startswith("-") else _HUGE
    return int(digits)


def _no_constant(word: str) -> Any:
    raise _malformed(f"{word} is not JSON; expected a finite number")


def _malformed(message: str) -> InvalidRequest:
    return InvalidRequest("malformed_json", message)
