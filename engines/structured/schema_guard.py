"""Refuses JSON Schemas before they are compiled: sizes, depth, types of keywords, contradictions, references, cycles.

The grammar engine accepts some of these without a word (`{"$ref": "#"}`, `maxItems: 10^9`), and where it refuses, it
names no place. Here every fault has its JSON pointer. Nothing is ever fetched, and nothing loosened silently.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import unquote

from engines.structured.errors import BadConstraint
from engines.structured.regex_guard import check_pattern

MAX_SCHEMA_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 32
MAX_SUBSCHEMAS: Final = 5_000
MAX_ITEMS: Final = 10_000
MAX_LENGTH: Final = 100_000
TYPES: Final = ("string", "number", "integer", "boolean", "object", "array", "null")
# Keywords that restrict what is valid, and that the grammar engine does not have.
UNSUPPORTED: Final = (
    "$anchor", "$dynamicAnchor", "$dynamicRef", "$recursiveRef", "$vocabulary", "contains", "dependencies",
    "dependentRequired", "dependentSchemas", "else", "if", "maxContains", "minContains", "not", "propertyNames", "then",
    "unevaluatedItems", "unevaluatedProperties", "uniqueItems", "x-guidance",
)  # fmt: skip
_COUNTS: Final = {
    "minItems": MAX_ITEMS, "maxItems": MAX_ITEMS, "minProperties": MAX_ITEMS, "maxProperties": MAX_ITEMS,
    "minLength": MAX_LENGTH, "maxLength": MAX_LENGTH,
}  # fmt: skip
_NUMBERS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_PAIRS: Final = (
    ("minimum", "maximum"), ("minLength", "maxLength"), ("minItems", "maxItems"), ("minProperties", "maxProperties"),
)  # fmt: skip
_MAPS: Final = ("properties", "patternProperties", "$defs", "definitions")
_LISTS: Final = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLES: Final = ("items", "additionalProperties", "additionalItems")
_INDEX: Final = re.compile(r"[0-9]{1,9}")
_SAME_PLACE: Final = ("anyOf", "oneOf", "allOf")  # a reference through these consumes nothing


def check_schema(schema: Any, *, needs_object: bool = False, will_compile: bool = True) -> str:
    """The schema as compact JSON text, if it can be served.

    Args:
        needs_object: it must describe an object (parameters of a tool).
        will_compile: False lets keywords pass that only a grammar would need (a tool that the model is free to use).

    Raises:
        BadConstraint: with the JSON pointer of the fault.
    """
    if not isinstance(schema, dict | bool) or (needs_object and not isinstance(schema, dict)):
        raise BadConstraint("invalid_value", "a JSON Schema must be an object")
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}  # the same, as the compiler takes it
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise BadConstraint("invalid_value", "a JSON Schema must not hold a lone surrogate") from error
    if num_bytes > MAX_SCHEMA_BYTES:
        raise BadConstraint("schema_too_complex", f"a JSON Schema may have at most {MAX_SCHEMA_BYTES} bytes")
    if needs_object and schema.get("type", "object") != "object":
        raise BadConstraint("invalid_value", "the type of a tool's parameters must be object", pointer="/type")
    for num_schemas, (place, pointer, depth) in enumerate(_subschemas(schema), start=1):
        if depth > MAX_DEPTH:
            raise BadConstraint("schema_too_complex", f"at most {MAX_DEPTH} levels are accepted", pointer=pointer)
        if num_schemas > MAX_SUBSCHEMAS:
            raise BadConstraint("schema_too_complex", f"at most {MAX_SUBSCHEMAS} subschemas are accepted")
        _check_place(place, pointer, will_compile=will_compile)
    _check_references(schema)
    return text


def _subschemas(schema: Any, pointer: str = "", depth: int = 0) -> Iterator[tuple[dict[str, Any], str, int]]:
    """Every object schema with its pointer, outermost first. Does not go deeper than the first that is too deep."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise BadConstraint("invalid_value", "a subschema must be an object or a boolean", pointer=pointer)
    children = list(_children(schema, pointer))
    yield schema, pointer, depth
    for inner, where in children:
        yield from _subschemas(inner, where, depth + 1)


def _children(schema: dict[str, Any], pointer: str) -> Iterator[tuple[Any, str]]:
    for name in _MAPS:
        for key, inner in _typed(schema, name, dict, "an object of schemas", pointer, {}).items():
            yield inner, f"{pointer}/{name}/{_escaped(key)}"
    for name in _LISTS:
        for i, inner in enumerate(_typed(schema, name, list, "an array of schemas", pointer, [])):
            yield inner, f"{pointer}/{name}/{i}"
    for name in _SINGLES:
        if name in schema:
            yield schema[name], f"{pointer}/{name}"


def _check_place(schema: dict[str, Any], pointer: str, *, will_compile: bool) -> None:
    for name in UNSUPPORTED:
        if name in schema and will_compile:
            message = f"the keyword {name} is not supported by constrained decoding; leave it out"
            raise BadConstraint("unsupported", message, pointer=f"{pointer}/{name}")
    _check_type(schema, pointer)
    for name in _LISTS:
        if schema.get(name) == [] and name != "prefixItems":
            raise BadConstraint("invalid_value", f"{name} must not be empty", pointer=f"{pointer}/{name}")
    if _typed(schema, "enum", list, "an array of values", pointer, None) == []:
        raise BadConstraint("invalid_value", "enum must hold at least one value", pointer=f"{pointer}/enum")
    _check_numbers(schema, pointer)
    pattern = _typed(schema, "pattern", str, "a string", pointer, None)
    if pattern is not None:
        check_pattern(pattern, pointer=f"{pointer}/pattern")
    for key in schema.get("patternProperties", {}):
        check_pattern(key, pointer=f"{pointer}/patternProperties/{_escaped(key)}")
    _typed(schema, "format", str, "a string", pointer, None)
    _check_required(schema, pointer)


def _check_type(schema: dict[str, Any], pointer: str) -> None:
    if "type" not in schema:
        return
    given = schema["type"]
    names = given if isinstance(given, list) else [given]
    if not names or not all(isinstance(name, str) and name in TYPES for name in names):
        message = f"type must be one of {', '.join(TYPES)}, or an array of them (got {_shown(given)})"
        raise BadConstraint("invalid_value", message, pointer=f"{pointer}/type")


def _check_numbers(schema: dict[str, Any], pointer: str) -> None:
    for name in _NUMBERS:
        value = schema.get(name, 0)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or (isinstance(value, float) and not math.isfinite(value)):
            message = f"{name} must be a number (got {_shown(value)})"
            raise BadConstraint("invalid_value", message, pointer=f"{pointer}/{name}")
    if "multipleOf" in schema and schema["multipleOf"] <= 0:
        raise BadConstraint("invalid_value", "multipleOf must be above 0", pointer=f"{pointer}/multipleOf")
    for name, limit in _COUNTS.items():
        value = schema.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 <= value < 1e18 and value % 1 == 0):
            message = f"{name} must be an integer of at least 0 (got {_shown(value)})"
            raise BadConstraint("invalid_value", message, pointer=f"{pointer}/{name}")
        if value > limit:
            message = f"{name} is {_shown(value)}, at most {limit} is accepted"
            raise BadConstraint("schema_too_complex", message, pointer=f"{pointer}/{name}")
    for low, high in _PAIRS:
        if low in schema and high in schema and schema[low] > schema[high]:
            message = f"{low} ({_shown(schema[low])}) is above {high} ({_shown(schema[high])}): nothing is valid"
            raise BadConstraint("invalid_value", message, pointer=f"{pointer}/{low}")


def _check_required(schema: dict[str, Any], pointer: str) -> None:
    required = _typed(schema, "required", list, "an array of strings", pointer, [])
    for i, name in enumerate(required):
        if not isinstance(name, str):
            message = f"required must hold strings (got {_shown(name)})"
            raise BadConstraint("invalid_value", message, pointer=f"{pointer}/required/{i}")
        if schema.get("properties", {}).get(name) is False:
            message = f"the required property {_shown(name)} is set to false: nothing is valid"
            raise BadConstraint("invalid_value", message, pointer=f"{pointer}/properties/{_escaped(name)}")


def _check_references(schema: Any) -> None:
    """Every `$ref` points into this schema, and following references without consuming any text comes to an end."""
    done: set[int] = set()
    for place, pointer, _ in list(_subschemas(schema)):
        _follow(schema, place, pointer, done, [])


def _follow(root: Any, place: Any, pointer: str, done: set[int], path: list[int]) -> None:
    if not isinstance(place, dict) or id(place) in done:
        return
    if id(place) in path:
        raise BadConstraint("invalid_value", "this reference leads back to itself", pointer=pointer)
    if len(path) > 10 * MAX_DEPTH:
        raise BadConstraint("schema_too_complex", "this chain of references is too long", pointer=pointer)
    path.append(id(place))
    if "$ref" in place:
        _follow(root, _resolve(root, place["$ref"], f"{pointer}/$ref"), f"{pointer}/$ref", done, path)
    for name in _SAME_PLACE:
        inners = place.get(name)
        for i, inner in enumerate(inners if isinstance(inners, list) else []):
            _follow(root, inner, f"{pointer}/{name}/{i}", done, path)
    path.pop()
    done.add(id(place))


def _resolve(root: Any, ref: Any, pointer: str) -> Any:
    if not isinstance(ref, str):
        raise BadConstraint("invalid_value", f"$ref must be a string (got {_shown(ref)})", pointer=pointer)
    if ref != "#" and not ref.startswith("#/"):
        message = f"$ref must point into this schema, as #/$defs/name (got {_shown(ref)}); nothing is fetched"
        raise BadConstraint("invalid_value", message, pointer=pointer)
    found = root
    for part in ref.split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and _INDEX.fullmatch(key) and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, dict) and key in found:
            found = found[key]
        else:
            raise BadConstraint("invalid_value", f"$ref {_shown(ref)} points to nothing", pointer=pointer)
    if not isinstance(found, dict | bool):
        raise BadConstraint("invalid_value", f"$ref {_shown(ref)} points to no schema", pointer=pointer)
    return found


def _typed(schema: dict[str, Any], name: str, kind: type, words: str, pointer: str, default: Any) -> Any:
    value = schema.get(name, default)
    if name in schema and not isinstance(value, kind):
        message = f"{name} must be {words} (got {_shown(value)})"
        raise BadConstraint("invalid_value", message, pointer=f"{pointer}/{name}")
    return value


def _escaped(key: str) -> str:
    return key[:100].replace("~", "~0").replace("/", "~1")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
