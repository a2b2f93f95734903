"""Fields that say what an output must look like: `response_format` and `structured_outputs`.

Everything that can be wrong with them is found here, at submission: first by looking, then by compiling in a checker
process. A stream never breaks because of a bad schema.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from engines.structured import BadConstraint, CheckerBusy, Constraint, check_schema, choice_grammar
from engines.structured.regex_guard import check_pattern
from webapp.errors import InvalidRequest, Overloaded
from webapp.openai.fields import Boolean, OneOf, Text, out_of_range, shown, wrong_type
from webapp.openai.served_model import ServedModel
from webapp.openai.surface import Checked

MAX_CHOICES: Final = 1024
MAX_TEXT: Final = 256 * 1024
FORMATS: Final = ("text", "json_object", "json_schema")
KINDS: Final = ("json", "regex", "choice", "grammar", "json_object")
ANY_OBJECT: Final = '{"type":"object"}'
_SCHEMA_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Structured:
    """A constraint and the field it came from, for errors."""

    constraint: Constraint
    path: str


def check_response_format(value: Any, path: str) -> Structured | None:
    """None for plain text.

    Raises:
        InvalidRequest: with the path; faults inside of a schema also with their JSON pointer.
    """
    if not isinstance(value, dict):
        raise wrong_type(path, "an object", value)
    kind = value.get("type")
    if kind is None:
        raise InvalidRequest("missing_field", f"{path}.type is required", param=f"{path}.type")
    if kind == "structural_tag":
        raise InvalidRequest("unsupported", f"{path}.type structural_tag is not supported", param=f"{path}.type")
    kind = OneOf(FORMATS)(kind, f"{path}.type")
    _only_known(value, {"type", "json_schema"} if kind == "json_schema" else {"type"}, path)
    if kind == "text":
        return None
    if kind == "json_object":
        return Structured(Constraint("json", ANY_OBJECT), path)
    return _json_schema(value.get("json_schema"), f"{path}.json_schema")


def check_structured_outputs(value: Any, path: str) -> Structured | None:
    """Exactly one kind of constraint (vLLM's field). None where all are null.

    Raises:
        InvalidRequest: as above.
    """
    if not isinstance(value, dict):
        raise wrong_type(path, "an object", value)
    _only_known(value, set(KINDS), path)
    given = [kind for kind in KINDS if value.get(kind) is not None and value[kind] is not False]
    if len(given) > 1:
        message = f"{path} must hold one constraint only (got {' and '.join(given)})"
        raise InvalidRequest("conflict_fields", message, param=path)
    if not given:
        if not value:
            message = f"{path} must hold one of {', '.join(KINDS)}"
            raise InvalidRequest("invalid_value", message, param=path)
        return None
    kind = given[0]
    where = f"{path}.{kind}"
    return Structured(_constraint(kind, value[kind], where), where)


def output_constraint(checked: Checked) -> Structured | None:
    """What the two fields ask for together.

    Raises:
        InvalidRequest: both ask for something.
    """
    by_format: Structured | None = checked.get("response_format", None)
    by_kind: Structured | None = checked.get("structured_outputs", None)
    if by_format is not None and by_kind is not None:
        message = "response_format and structured_outputs must not both constrain the output; send one of them"
        raise InvalidRequest("conflict_fields", message, param="structured_outputs")
    return by_format or by_kind


def check_compiles(structured: Structured | None, model: ServedModel) -> Constraint | None:
    """The constraint, if this model can follow it. Blocks, for milliseconds mostly.

    Raises:
        InvalidRequest: it cannot be compiled, or not within its limits.
        Overloaded: every checker is at work.
    """
    if structured is None:
        return None
    try:
        model.constraints.check(structured.constraint)
    except BadConstraint as error:
        raise refusal(error, structured.path) from error
    except CheckerBusy as error:
        raise Overloaded("overloaded", str(error), retry_after_s=2) from error
    return structured.constraint


def refusal(error: BadConstraint, path: str) -> InvalidRequest:
    """The error of a field whose schema, pattern or grammar is bad."""
    where = f"{path}: at #{error.pointer}" if error.pointer else path
    return InvalidRequest(error.code, f"{where}: {error.message}", param=path)


def schema_text(schema: Any, path: str, *, needs_object: bool = False, will_compile: bool = True) -> str:
    """A schema that a client sent, checked.

    Raises:
        InvalidRequest: see `engines.structured.check_schema`.
    """
    try:
        return check_schema(schema, needs_object=needs_object, will_compile=will_compile)
    except BadConstraint as error:
        raise refusal(error, path) from error


def _json_schema(value: Any, path: str) -> Structured:
    if value is None:
        raise InvalidRequest("missing_field", f"{path} is required", param=path)
    if not isinstance(value, dict):
        raise wrong_type(path, "an object", value)
    _only_known(value, {"name", "description", "schema", "strict"}, path)
    for name in ("name", "schema"):
        if value.get(name) is None:
            raise InvalidRequest("missing_field", f"{path}.{name} is required", param=f"{path}.{name}")
    name = Text(1, 64)(value["name"], f"{path}.name")
    if not _SCHEMA_NAME.fullmatch(name):
        message = f"{path}.name must be letters, digits, _ and - only (got {shown(name)})"
        raise InvalidRequest("invalid_value", message, param=f"{path}.name")
    if value.get("strict") is not None:
        Boolean()(value["strict"], f"{path}.strict")
    where = f"{path}.schema"
    if not isinstance(value["schema"], dict):
        raise wrong_type(where, "an object", value["schema"])
    return Structured(Constraint("json", schema_text(value["schema"], where)), where)


def _constraint(kind: str, value: Any, path: str) -> Constraint:
    if kind == "json_object":
        Boolean()(value, path)
        return Constraint("json", ANY_OBJECT)
    if kind == "json":
        return Constraint("json", schema_text(_schema_of(value, path), path))
    if kind == "regex":
        pattern = Text(1, MAX_TEXT)(value, path)
        try:
            check_pattern(pattern)
        except BadConstraint as error:
            raise refusal(error, path) from error
        return Constraint("regex", pattern)
    if kind == "grammar":
        if isinstance(value, str) and len(value) > MAX_TEXT:
            message = f"{path} has {len(value)} characters, at most {MAX_TEXT} are accepted"
            raise InvalidRequest("schema_too_complex", message, param=path)
        return Constraint("lark", Text(1, MAX_TEXT)(value, path))
    return Constraint("lark", choice_grammar(_choices(value, path)))


def _schema_of(value: Any, path: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(Text(1, MAX_TEXT)(value, path))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("invalid_value", f"{path} is no JSON: {str(error)[:200]}", param=path) from error


def _choices(value: Any, path: str) -> list[str]:
    if not isinstance(value, list):
        raise wrong_type(path, "an array of strings", value)
    if not value:
        raise InvalidRequest("invalid_value", f"{path} must hold at least one string", param=path)
    if len(value) > MAX_CHOICES:
        raise out_of_range(path, f"an array of at most {MAX_CHOICES} strings", f"{len(value)} strings")
    seen: set[str] = set()
    for i, choice in enumerate(value):
        where = f"{path}[{i}]"
        if Text(1, 4096)(choice, where) in seen:
            raise InvalidRequest("invalid_value", f"{where} is there twice", param=where)
        seen.add(choice)
    return value


def _only_known(value: dict[str, Any], known: set[str], path: str) -> None:
    for name, option in value.items():
        if name not in known and option is not None:
            where = f"{path}.{name[:100]}"
            raise InvalidRequest("unsupported", f"{where} is not supported; leave it out", param=where)
